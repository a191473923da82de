"""JSON schemas at the door: what a client may ask a text to be.

llguidance refuses what it does not know (`not`, `if`, `uniqueItems`, ...) and what contradicts itself. This module
refuses, before that, what is too large to compile, and what has no finite instance:

    {"$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}}, ...}
"""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_jax.inputs import shown
from deepseek_jax.serving.fields import told

MOST_CHARACTERS = 256 * 1024  # of a schema as JSON
MOST_DEPTH = 64  # as JSON
MOST_NESTED = 600  # levels with all that references name: the compiler's stack ends near 3,000
MOST_PROPERTIES = 2_000  # which compile in a second
MOST_REQUIRED = 100_000  # items, characters or properties that a value must have at least

# of the search for endless recursion, which gives up behind them
_MOST_STEPS, _MOST_RECURSION = 20_000, 200
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
        found = "false, which nothing fits" if schema is False else told(schema)[:80]
        raise ValueError(f"{name} is {found}; give a JSON schema, an object")
    _check_size(schema, name)
    try:
        text = json.dumps(schema, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {shown(str(error))}") from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are compiled")
    if not _Finite(schema).fits(schema):
        raise ValueError(f"{name} cannot be met: whatever fits it has itself inside, without end")
    return text


def _check_size(schema: Mapping, name: str) -> None:
    targets: dict[int, Any] = {}
    num_properties = 0
    for value in itertools.chain.from_iterable(_levels(schema, name)):
        if not isinstance(value, Mapping):
            continue
        for key in _AT_LEAST:
            count = value.get(key)
            if isinstance(count, int | float) and count > MOST_REQUIRED:
                raise ValueError(f"{name} has {key} {shown(str(count))[:20]}; more than {MOST_REQUIRED:,} fit no text")
        if isinstance(value.get("properties"), Mapping):
            num_properties += len(value["properties"])
        if isinstance(value.get("$ref"), str):
            target = _target(value["$ref"], schema)
            targets[id(target)] = target
    if num_properties > MOST_PROPERTIES:
        raise ValueError(f"{name} has {num_properties:,} properties; at most {MOST_PROPERTIES:,} are compiled")
    nested = 0
    for target in targets.values():
        nested += 1 + max((depth for depth, _ in enumerate(_levels(target, name))), default=0)
        if nested > MOST_NESTED:
            raise ValueError(f"{name} may nest more than {MOST_NESTED} levels deep by its references")


def check_depth(value: Any, name: str) -> None:
    """Raise ValueError if a JSON value, with schemas in it, is nested too deep; `name` is where it stands."""
    for _ in _levels(value, name, MOST_DEPTH + 16):
        pass


def _levels(value: Any, name: str, most: int = MOST_DEPTH) -> Iterator[list[Any]]:
    """Yield the values on each level of a JSON value; not recursive, since it may be deep."""
    level = [value]
    for _ in range(most):
        yield level
        level = [
            below
            for value in level
            if isinstance(value, Mapping | list)
            for below in (value.values() if isinstance(value, Mapping) else value)
        ]
        if not level:
            return
    raise ValueError(f"{name} is nested more than {most} levels deep")


class _Finite:
    """Finds endless recursion in a schema. Other contradictions and wrong types are left to the compiler."""

    def __init__(self, root: Mapping):
        self._root = root
        self._known: set[str] = set()  # references that something finite fits
        self._steps = 0

    def fits(self, schema: Any, inside: tuple[str, ...] = (), depth: int = 0) -> bool:
        """Return whether something finite may fit `schema`; `inside` are the references that lead to it."""
        self._steps += 1
        if not isinstance(schema, Mapping) or self._steps > _MOST_STEPS or depth > _MOST_RECURSION:
            return True
        below = functools.partial(self.fits, inside=inside, depth=depth + 1)
        if not self._reference_fits(schema.get("$ref"), inside, depth):
            return False
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, Mapping) and isinstance(required, list) and _only(schema, "object"):
            names = [name for name in required if isinstance(name, str)]
            if not all(below(properties.get(name)) for name in names):
                return False
        least = schema.get("minItems")
        if isinstance(least, int) and least > 0 and _only(schema, "array"):
            first = schema.get("prefixItems")
            items = first[:least] if isinstance(first, list) and first else [schema.get("items")]
            if not all(below(item) for item in items):
                return False
        for key, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            parts = schema.get(key)
            if isinstance(parts, list) and parts and not enough(below(part) for part in parts):
                return False
        return True

    def _reference_fits(self, reference: Any, inside: tuple[str, ...], depth: int) -> bool:
        if not isinstance(reference, str) or reference in self._known:
            return True
        if reference in inside or not self.fits(_target(reference, self._root), (*inside, reference), depth + 1):
            return False
        self._known.add(reference)
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
