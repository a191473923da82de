"""JSON schemas at the door: what a client may ask a text to be.

llguidance refuses what it does not know (`not`, `if`, `uniqueItems`, ...) and what contradicts itself. This module
refuses, before that, what is too large to compile, and what has no finite instance:

    {"$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}}, ...}
"""

import json
from collections.abc import Mapping
from typing import Any

from deepseek_jax.inputs import shown

MOST_CHARACTERS = 256 * 1024  # of a schema as JSON
MOST_DEPTH = 64
MOST_REQUIRED = 100_000  # items, characters or properties that a value must have at least

_AT_LEAST = ("minItems", "minLength", "minProperties")


def schema_text(schema: Any, name: str) -> str:
    """Return a schema as JSON.

    Args:
        schema: from a client: an object of JSON, or a boolean.
        name: what the schema is called in the request.

    Raises:
        ValueError: it is no schema, too large or too deep, or nothing finite fits it.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        found = "false, which nothing fits" if schema is False else shown(repr(schema))[:80]
        raise ValueError(f"{name} is {found}; give a JSON schema, an object")
    _check_size(schema, name)
    try:
        text = json.dumps(schema, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {shown(str(error))}") from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are compiled")
    if not _finite(schema, schema, ()):
        raise ValueError(f"{name} cannot be met: whatever fits it has itself inside, without end")
    return text


def _check_size(schema: Any, name: str) -> None:
    level = [schema]
    for _ in range(MOST_DEPTH):
        below = []
        for value in level:
            if isinstance(value, Mapping):
                for key in _AT_LEAST:
                    count = value.get(key)
                    if isinstance(count, int | float) and count > MOST_REQUIRED:
                        raise ValueError(f"{name} has {key} {count}; more than {MOST_REQUIRED:,} fit no text")
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
        level = below
        if not level:
            return
    raise ValueError(f"{name} is nested more than {MOST_DEPTH} levels deep")


def _finite(schema: Any, root: Mapping, inside: tuple[str, ...]) -> bool:
    """Return whether something finite may fit `schema`; `inside` are the references that lead to it.

    Only endless recursion is found: other contradictions and wrong types are left to the compiler.
    """
    if not isinstance(schema, Mapping):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in inside:
            return False
        if not _finite(_target(reference, root), root, (*inside, reference)):
            return False
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping) and isinstance(required, list) and _only(schema, "object"):
        names = [name for name in required if isinstance(name, str)]
        if not all(_finite(properties.get(name), root, inside) for name in names):
            return False
    least = schema.get("minItems")
    if isinstance(least, int) and least > 0 and _only(schema, "array"):
        first = schema.get("prefixItems")
        items = first[:least] if isinstance(first, list) and first else [schema.get("items")]
        if not all(_finite(item, root, inside) for item in items):
            return False
    for key, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        parts = schema.get(key)
        if isinstance(parts, list) and parts and not enough(_finite(part, root, inside) for part in parts):
            return False
    return True


def _only(schema: Mapping, kind: str) -> bool:
    return schema.get("type") in (kind, [kind])


def _target(reference: str, root: Mapping) -> Any:
    """Return what a reference inside the schema names; None where it names nothing."""
    if not reference.startswith("#"):
        return None
    value: Any = root
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value
