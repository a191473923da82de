"""Jinja as Hugging Face transformers sets it up for chat templates.

It is the sandbox of immutable values with `break` and `continue`, a plain `tojson`, and

    raise_exception(text)                      a template refuses a conversation
    strftime_now(format)                       the time, for templates that tell the model the date
    {% generation %} ... {% endgeneration %}   around what the model says; transformers makes masks of it, the text is
                                               the same without
"""

import datetime
import functools
import json
import re
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_jax.inputs import shown

# What a template can raise: Jinja's own errors, and those of Python's operators and methods on its values.
FAULTS = (
    jinja2.TemplateError,
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError),
)
TIME = "strftime_now"
JSON_TYPES = {"NoneType": "null", "str": "string", "dict": "object"}
_TYPE = re.compile(rf"\b({'|'.join(JSON_TYPES)})\b")


class Generation(Extension):
    """The block `{% generation %}`, as if only its content stood there; what is set inside is not seen outside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Scope:
        """Return the content as a scope."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of all templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = _to_json  # Jinja's own escapes <, >, & and '
    made.globals["raise_exception"] = _refuse
    made.globals[TIME] = _strftime_now
    return made


def told(error: BaseException) -> str:
    """Return what is wrong; an exception of Python's own with its name, and with JSON's names of types."""
    if isinstance(error, jinja2.TemplateError):
        return shown(str(error))
    return shown(f"{type(error).__name__}: {_TYPE.sub(lambda found: JSON_TYPES[found[0]], str(error))}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
