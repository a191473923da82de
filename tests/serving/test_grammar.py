"""JSON schemas as masks, over the released vocabulary and over bytes."""

import json
import threading

import jsonschema
import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.serving.grammar import Grammars
from tests.support.masks import allowed, refused
from tests.support.released import tokenizer

V = 129_280  # of the model; the tokenizer has 128,815
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"items": {"enum": ["a", "b"]}}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(tokenizer(), V, ends=[128_805])


@pytest.mark.parametrize(
    ("schema", "text", "rest"),
    [
        (PERSON, '{"name": "J\\"ö 👩‍🔬", "age": -42, "tags": ["a", "b"]}', None),
        (PERSON, '{\n  "name": "",\n  "age": 0\n}', None),
        (PERSON, '{"name":"","age":0}', None),
        (PERSON, '{"name": "x"}', '"}'),
        (PERSON, '{"name": "x", "age": 1, "more": 1}', "more"),
        (PERSON, '{"name": "x", "age": "1"}', ' "'),
        (PERSON, '{"name": "x", "age": 1', "EOS"),
        (PERSON, '{"name": "x", "age": 1} and', " and"),
        (True, "[null, 1.5e3]", None),
        ({}, '"x"', None),
        ({"type": "object"}, '{"a": {"b": []}}', None),
        ({"type": "object"}, "[1]", "["),
        ({"type": ["string", "null"]}, "null", None),
        ({"enum": [{"a": 1}, [1, "x"], None]}, '{"a": 1}', None),
        ({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, "[[], [[]]]", None),
        ({"type": "string", "pattern": "^[a-c]{2}$"}, '"ab"', None),
        ({"type": "string", "format": "date"}, '"2026-11-29"', None),
    ],
)
def test_what_fits_a_schema(grammars, schema, text, rest):
    found = refused(grammars.schema(schema, "schema"), tokenizer(), text, V)
    assert found == rest if rest is None or rest == "EOS" else found.startswith(rest)


def test_the_end_is_allowed_exactly_where_the_text_may_end(grammars):
    make = grammars.schema({"type": "integer"}, "schema")
    grammar, ends = make(), {1, 128_805}
    assert not ends & set(allowed(grammar, V))
    grammar.accept(tokenizer().encode("4")[0])
    may = set(allowed(grammar, V))
    assert ends <= may and not set(tokenizer().special_ids.values()) - ends & may
    assert max(may) < tokenizer().vocab_size
    for token in (1, 128_805, 1):  # where EOS is ignored
        grammar.accept(token)
        assert set(allowed(grammar, V)) == ends
    grammar.rollback(3)
    assert set(allowed(grammar, V)) == may
    with pytest.raises(RuntimeError, match="the grammar of this text stopped"):
        grammar.accept(tokenizer().encode("x")[0])
    with pytest.raises(RuntimeError, match="the grammar of this text stopped"):
        allowed(grammar, V)
    assert set(allowed(make(), V)) == set(allowed(make(), V))  # others go on
    with pytest.raises(ValueError, match=r"words_W is int64\[4040\], not int32\[4040\]"):
        make().fill(np.zeros(4040, np.int64))


def test_no_special_token_stands_in_a_string(grammars):
    """Spelled in ordinary tokens it does."""
    special = set(tokenizer().special_ids.values())
    grammar = grammars.schema({"type": "string"}, "schema")()
    for token in tokenizer().encode('"<｜User｜></think>x'):
        assert not special & set(allowed(grammar, V))
        grammar.accept(token)


def test_drafts_are_rolled_back(grammars):
    ids = tokenizer().encode('{"name": "x", "age": 12}')
    grammar = grammars.schema(PERSON, "schema")()
    masks = []
    for token in ids:
        masks.append(allowed(grammar, V).tolist())
        grammar.accept(token)
    for count in (1, 4, len(ids) - 5):
        grammar.rollback(count)
        ids, masks, rest = ids[:-count], masks[: len(ids) - count + 1], ids[-count:]
        assert allowed(grammar, V).tolist() == masks[-1]
    for token in rest:
        grammar.accept(token)


def test_blanks_are_bounded(grammars):
    """A model that writes blanks for ever never ends."""
    make = grammars.schema(PERSON, "schema")
    assert refused(make, tokenizer(), "{" + "\n" * 64 + '"name": "x", "age": 1}', V) is None
    assert refused(make, tokenizer(), "{" + "\n" * 65 + '"name": "x", "age": 1}', V)


def test_a_character_may_span_tokens(grammars):
    ours = tokenizer()
    single = {piece: token for token, piece in enumerate(ours.token_bytes) if len(piece) == 1}
    grammar = grammars.schema({"type": "string"}, "schema")()
    for byte in '"é👩'.encode():
        assert single[bytes([byte])] in allowed(grammar, V)
        grammar.accept(single[bytes([byte])])
    assert single[b"\xff"] not in allowed(grammar, V)
    bytes_only = byte_tokenizer()
    make = Grammars(bytes_only, bytes_only.vocab_size + 40).schema({"type": "string"}, "schema")
    assert refused(make, bytes_only, '"é👩"', bytes_only.vocab_size + 40) is None
    assert refused(make, bytes_only, '"é', bytes_only.vocab_size + 40) == "EOS"


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "string", "minLength": 5, "maxLength": 2}, r"minLength \(5\) is greater than maxLength \(2\)"),
        ({"enum": []}, "cannot be used"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property 'a' is unsatisfiable"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
        ({"not": {"type": "string"}}, r'Unimplemented keys: \["not"\]'),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "http://example.com/x"}, "not present in a registry"),
        ({"type": "object", "properties": []}, "properties must be an object"),
        ({"type": "integer", "multipleOf": 10**9}, "too many expressions"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented"),  # a client does not set our options
        (False, "is false, which nothing fits"),
    ],
)
def test_what_nothing_fits_or_is_not_supported_is_refused(grammars, schema, complaint):
    with pytest.raises(ValueError, match=f"(?s)^response_format.x .*{complaint}") as found:
        grammars.schema(schema, "response_format.x")
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_texts_drawn_from_the_masks_fit(grammars):
    """Whatever is drawn, it is valid when it ends, which is as soon as it may."""
    schema = {"type": "array", "items": {"anyOf": [PERSON, {"type": "null"}, {"type": "number"}]}, "maxItems": 3}
    make, rng, ours = grammars.schema(schema, "schema"), np.random.default_rng(0), tokenizer()
    closing = [token for token, piece in enumerate(ours.token_bytes) if piece and set(piece) <= set(b'"}], 0:')]
    for _ in range(5):
        grammar, ids = make(), []
        while 1 not in (may := allowed(grammar, V))[:2]:
            short = np.intersect1d(may, closing) if len(ids) > 10 else may
            ids.append(int(rng.choice(short if len(short) else may)))
            grammar.accept(ids[-1])
        jsonschema.validate(json.loads(ours.decode_bytes(ids)), schema)


def test_threads_compile_and_fill_at_once():
    shared, results = Grammars(tokenizer(), V), []

    def work(i):
        schema = {"type": "object", "properties": {f"k{i % 3}": {"type": "integer"}}, "required": [f"k{i % 3}"]}
        results.append(refused(shared.schema(schema, "schema"), tokenizer(), f'{{"k{i % 3}": {i}}}', V))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [None] * 12
