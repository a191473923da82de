"""What a reply must be: what `tool_choice` and `response_format` ask for, as a grammar.

    response_format           the schema's JSON
    tool_choice = required    one call or more of any tool, or of the one that is named
    both of tools and format  calls, or the schema's JSON
    a strict tool             any text, then calls or not; the arguments of strict tools fit their parameters
    one call at most          the same (`parallel_tool_calls` = false)
    some tools of all         the same, of the tools that are allowed

All of it behind the reasoning, where the model thinks.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.data.deepseek_chat import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.job import Grammar
from deepseek_jax.serving.conversation import Choice
from deepseek_jax.serving.fields import told
from deepseek_jax.serving.grammar import Grammars, json_rule
from deepseek_jax.serving.reasoning import Tokens, after_reasoning, reasoning_tokens
from deepseek_jax.serving.schema import MOST_CHARACTERS, schema_text

SCHEMA = "response_format.json_schema.schema"
_ANY_OBJECT = {"type": "object"}
_ANY_TEXT = "content: /(?s:.+)/"


class Constraints:
    """Makes the grammars of a model's replies."""

    def __init__(self, tokenizer: Tokenizer, grammars: Grammars, form: str):
        """Bind a model; `form` is the name of its chat format."""
        self._tokenizer, self._grammars, self._form = tokenizer, grammars, form

    @functools.cached_property
    def _reasoning(self) -> Tokens | None:
        return reasoning_tokens(self._tokenizer, self._grammars.vocab_size)

    def make(self, choice: Choice, response_format: Any, thinking: bool) -> Callable[[], Grammar] | None:
        """Return what makes the grammar of a reply; None if it may be anything.

        Args:
            choice: the tools that may be called.
            response_format: of the request.
            thinking: whether the prompt has opened the reasoning.

        Raises:
            ValueError: the format is wrong, or nothing fits it or a tool's parameters.
        """
        schema = read_response_format(response_format)
        if choice.mode == "none":
            if schema is None:
                return None
            found = self._grammars.schema(schema, SCHEMA)
        elif choice.mode == "required":
            found = self._calls(choice, None)
        elif schema is not None:
            self._grammars.schema(schema, SCHEMA)  # tells what is wrong with it
            found = self._calls(choice, f"content: {json_rule(schema, SCHEMA)}")
        elif not choice.parallel or choice.tools != choice.described or any(_strict(tool) for tool in choice.tools):
            found = self._calls(choice, _ANY_TEXT)
        else:
            return None
        if self._reasoning is not None and (thinking or self._form == "r1"):
            return after_reasoning(found, self._reasoning, thinking)
        return found

    def _calls(self, choice: Choice, content: str | None) -> Callable[[], Grammar]:
        """Return what makes grammars of calls, and of `content`, a rule, where that may come too."""
        schemas, size = {}, 0
        for tool in choice.tools:
            i = choice.described.index(tool)
            name = f"tools[{i}].function.parameters"
            schemas[tool["function"]["name"]] = parameters = (
                _ANY_OBJECT
                if content == _ANY_TEXT and not _strict(tool)
                else _parameters(tool["function"].get("parameters"), name)
            )
            size += len(schema_text(parameters, name))
            if size > MOST_CHARACTERS:
                raise ValueError(
                    f"the parameters of tools have more than {MOST_CHARACTERS:,} characters; give fewer tools"
                )
            self._grammars.schema(parameters, name)  # tells which one is wrong
        return self._grammars.lark(self._lark(schemas, choice.parallel, content), "tools")

    def _lark(self, schemas: dict[str, Any], parallel: bool, content: str | None) -> str:
        """Return the grammar of calls in the form that the model writes them in."""
        token = {
            name: f"<[{self._tokenizer.special_ids[name]}]>" for name in (CALLS, END_CALLS, CALL, END_CALL, SEPARATOR)
        }
        v31 = self._form == "v3.1"
        between = "" if v31 else '"\\n" '
        more = f" ({between}call)*" if parallel else ""
        start = "calls" if content is None else "content? calls?" if content == _ANY_TEXT else "calls | content"
        rules = [
            f"start: {start}",
            f"calls: {token[CALLS]} call{more} {token[END_CALLS]}",
            f"call: {token[CALL]} ({' | '.join(f'tool{i}' for i in range(len(schemas)))}) {token[END_CALL]}",
        ]
        if content is not None:
            rules.append(content)
        for i, (name, parameters) in enumerate(schemas.items()):
            before, behind = json.dumps(f"{name}\n```json\n"), json.dumps("\n```")
            rules += [
                f"tool{i}: {json.dumps(name)} {token[SEPARATOR]} arguments{i}"
                if v31
                else f'tool{i}: "function" {token[SEPARATOR]} {before} arguments{i} {behind}',
                f"arguments{i}: {json_rule(parameters, f'tools[{i}].function.parameters')}",
            ]
        return "\n".join(rules)


def read_response_format(value: Any) -> Any:
    """Return the JSON schema that a request's `response_format` asks for; None for any text.

    Raises:
        ValueError: it is none of OpenAI's formats.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else value
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    if kind != "json_schema" or not isinstance(value, Mapping):
        raise ValueError(
            f'response_format is {told(kind)[:80]}; its type must be "text", "json_object" or "json_schema"'
        )
    given = value.get("json_schema")
    if not isinstance(given, Mapping) or given.get("schema") is None:
        raise ValueError('response_format.json_schema has no schema; give {"name": ..., "schema": {...}}')
    return given["schema"]


def _strict(tool: Mapping) -> bool:
    return tool["function"].get("strict") is True


def _parameters(schema: Mapping | None, name: str) -> Mapping:
    """Return the schema of a tool's arguments, which are always an object."""
    if not schema:
        return _ANY_OBJECT
    if schema.get("type", "object") != "object":
        raise ValueError(f"{name} has the type {told(schema['type'])[:80]}; arguments are an object")
    return {"type": "object", **schema}
