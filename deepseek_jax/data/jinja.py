"""Jinja as Hugging Face transformers sets it up for chat templates.

It is the sandbox of immutable values with `break` and `continue`, a plain `tojson`, and

    raise_exception(text)                      a template refuses a conversation
    strftime_now(format)                       the time, for templates that tell the model the date
    {% generation %} ... {% endgeneration %}   around what the model says; transformers makes masks of it, the text is
                                               the same without

What a template reads is told by its program: comments and literal text do not count (`variables`, `fields`).
"""

import datetime
import functools
import json
import re
from typing import Any, NoReturn

import jinja2
import jinja2.meta
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
LISTS = ("default", "first", "last", "list", "rejectattr", "reverse", "selectattr", "sort")  # filters to some of a list
WHOLE = ("dictsort", "items", "pprint", "string", "tojson", "xmlattr")  # filters that read every field
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


@functools.lru_cache(maxsize=16)
def variables(source: str) -> frozenset[str]:
    """Return the variables that a template does not set before it reads them."""
    program = environment().parse(source)
    found = jinja2.meta.find_undeclared_variables(program)
    # `{% if not thinking is defined %}{% set thinking = false %}`: Jinja calls it declared
    asked = {test.node.name for test in program.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    ours = {name.name for name in program.find_all(nodes.Name) if name.ctx == "load"} & environment().globals.keys()
    return frozenset(found | asked | ours)


@functools.lru_cache(maxsize=16)
def fields(source: str) -> frozenset[str] | None:
    """Return the fields that a template reads of any object; None: it reads all fields of a message."""
    program = environment().parse(source)
    messages = _names_of_messages(program)
    read: set[str] = set()
    for node in program.find_all((nodes.Getattr, nodes.Getitem, nodes.Call, nodes.Filter, nodes.Output)):
        match node:
            case nodes.Call(node=nodes.Getattr(node=whole, attr="items" | "values")) if _held(whole) & messages:
                return None
            case nodes.Filter(node=whole, name=name) if name in WHOLE and _held(whole) & messages:
                return None
            case nodes.Output() if any(_held(whole) & messages for whole in node.nodes):
                return None
            case nodes.Getitem(node=whole, arg=nodes.Name(name=key)) if key in messages and _held(whole) & messages:
                return None  # for key in message: message[key]
            case nodes.Getattr(attr=name) | nodes.Getitem(arg=nodes.Const(value=str(name))):
                read.add(name)
            case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value=str(name)), *_]):
                read.add(name)
            case nodes.Filter():  # selectattr("tool_calls"), map(attribute="content")
                given = [*node.args, *(pair.value for pair in node.kwargs if pair.key == "attribute")]
                read |= {part for arg in given if isinstance(arg, nodes.Const) for part in str(arg.value).split(".")}
    return frozenset(read)


def _names_of_messages(program: nodes.Template) -> set[str]:
    """Return the names that a template gives to messages, or to a message; not those in a namespace."""
    macros = {macro.name: macro for macro in program.find_all(nodes.Macro)}
    bound = [(loop.target, loop.iter) for loop in program.find_all(nodes.For)]
    bound += [(assign.target, assign.node) for assign in program.find_all(nodes.Assign)]
    for call in program.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            bound += zip(macros[call.node.name].args, call.args, strict=False)
    names, before = {"messages"}, 0
    while len(names) > before:
        before = len(names)
        names |= {target.name for target, value in bound if isinstance(target, nodes.Name) and _held(value) & names}
    return names


def _held(expression: nodes.Node | None) -> set[str]:
    """Return the names of what an expression may be, or be an item of."""
    match expression:
        case nodes.Name():
            return {expression.name}
        case nodes.Getitem() if not isinstance(getattr(expression.arg, "value", None), str):
            return _held(expression.node)
        case nodes.Filter() if expression.name in LISTS:
            return _held(expression.node)
        case nodes.Add() | nodes.Or() | nodes.And():
            return _held(expression.left) | _held(expression.right)
        case nodes.CondExpr():
            return _held(expression.expr1) | _held(expression.expr2)
    return set()


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
