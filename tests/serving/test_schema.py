"""Schemas at the door: size, depth, and what has no finite instance."""

import json
import time

import pytest

from deepseek_jax.serving.schema import MOST_DEPTH, MOST_NESTED, MOST_PROPERTIES, schema_text


def needs(names, value):
    return {"type": "object", "properties": dict.fromkeys(names, value), "required": list(names)}


def chain(length, link):
    defs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": defs | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


DEEP = {}
for _ in range(50_000):
    DEEP = {"items": DEEP}
NODE = {"$ref": "#/$defs/node"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "title": "é"},
        chain(40, lambda ref: needs("ab", ref)),  # 2 ** 40 paths
        {"$defs": {"node": {"anyOf": [{"type": "null"}, needs("a", NODE)]}}, **NODE},
        {"$defs": {"node": {"type": "array", "items": NODE}}, **NODE},
        {"$defs": {"node": {"type": "object", "properties": {"a": NODE}}}, **NODE},
        {"$defs": {"node": {"properties": {"a": NODE}, "required": ["a"]}}, **NODE},  # fits 1
        {"$defs": {"a/b~": {"type": "string"}}, **needs("x", {"$ref": "#/$defs/a~1b~0"})},
        {"type": "object", "properties": {"$ref": {"type": "string"}, "minItems": {"type": "integer"}}},
        {"$ref": "#/anyOf/0", "anyOf": [{"type": "string"}]},
    ],
)
def test_schemas_pass_as_they_are(schema):
    assert json.loads(schema_text(schema, "s")) == schema


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ([], "s is \\[\\]; give a JSON schema"),
        (None, "s is null"),
        (False, "s is false"),
        ({"a": {1, 2}}, "s is not JSON"),
        ({"const": "\ud800"}, "s is not JSON"),
        (DEEP, f"nested more than {MOST_DEPTH} levels deep"),
        ({"enum": ["x" * 1000] * 300}, "s has 301,.* characters; at most 262,144"),
        ({"properties": {str(i): {} for i in range(MOST_PROPERTIES + 1)}}, "2,001 properties; at most 2,000"),
        ({"type": "array", "minItems": 10**9}, "minItems 1000000000; more than 100,000 fit no text"),
        (chain(1000, lambda ref: ref), f"nest more than {MOST_NESTED} levels deep by its references"),
        ({"$ref": "#"}, "cannot be met: whatever fits it has itself inside"),
        ({"$defs": {"node": needs("a", NODE)}, **NODE}, "cannot be met"),
        ({"$defs": {"node": needs("a", NODE)}, "anyOf": [NODE, NODE]}, "cannot be met"),
        ({"$defs": {"node": needs("a", NODE)}, "allOf": [{}, NODE]}, "cannot be met"),
        (
            {
                "$defs": chain(20, lambda ref: needs("ab", ref))["$defs"] | {"node": needs("a", NODE)},
                "allOf": [{"$ref": "#/$defs/d0"}, NODE],
            },
            "cannot be met",
        ),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "cannot be met"),
        ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "cannot be met"),
    ],
)
def test_schemas_are_refused_quickly(schema, complaint):
    begin = time.thread_time()
    with pytest.raises(ValueError, match=complaint):
        schema_text(schema, "s")
    assert time.thread_time() - begin < 5  # seconds of the CPU


def test_a_chain_of_references_that_passes_does_not_end_the_process():
    """llguidance compiles references recursively: 1,000 of them overflow its stack, and no exception comes."""
    from deepseek_jax.data.bpe import byte_tokenizer
    from deepseek_jax.serving.grammar import Grammars

    grammars = Grammars(byte_tokenizer(), byte_tokenizer().vocab_size)
    for link, length in ((lambda ref: ref, 290), (lambda ref: needs("a", ref), 140)):
        grammars.schema(chain(length, link), "s")()
