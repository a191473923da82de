"""How a model chats: from a request's conversation to a prompt, a grammar, and how the reply is read.

    v3      DeepSeek-V3, V3-0324      r1     R1, R1-0528: thinks first
    v3.1    V3.1 and its successors with its template: thinks where `thinking` is true
    other   any other template: no calls of tools

A conversation without tools is written by the folder's own template, and so is one with tools if that template knows
them. The released ones do not: then `data.deepseek_chat` has the form.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.data import deepseek_chat
from deepseek_jax.data.chat import RESERVED, ChatTemplate
from deepseek_jax.data.tokenizer import CONFIG_NAME, Tokenizer
from deepseek_jax.inference.job import Grammar
from deepseek_jax.inputs import local_path, read_json, read_text, shown
from deepseek_jax.serving.constraints import Constraints
from deepseek_jax.serving.conversation import Choice, read_choice, read_messages
from deepseek_jax.serving.grammar import Grammars
from deepseek_jax.serving.reply import END_THINK, STRUCTURE, THINK, ReplyReader, mark
from deepseek_jax.serving.schema import check_depth

FORMS = {"v3": deepseek_chat.V3, "r1": deepseek_chat.R1, "v3.1": deepseek_chat.V3_1}
OTHER = "other"
TEMPLATE_FILE = "chat_template.jinja"

# A template that writes arguments as JSON wants the object, one that joins them wants the text.
_ARGUMENTS_AS_OBJECT = re.compile(r"arguments['\"]?\]?\s*(\|\s*(tojson|items|dictsort)|\.items\()")


class Chat(NamedTuple):
    """A conversation, ready for the engine.

    Attributes:
        prompt: ids.
        grammar: what the reply must be, for `Job.grammar`.
        spelled: texts that stand for tokens, for `Job.spelled`.
        reader: makes what reads one reply.
    """

    prompt: list[int]
    grammar: Callable[[], Grammar] | None
    spelled: Mapping[int, str]
    reader: Callable[[], ReplyReader]


class ChatFormat:
    """The format of one model; any thread may use it.

    Attributes:
        name: one of `FORMS`, or `OTHER`.
        grammars: compiles what a text must be.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        vocab_size: int,
        name: str | None = None,
        ends: Iterable[int] = (),
    ):
        """Choose the format.

        Args:
            tokenizer: of the model.
            template: of its folder.
            vocab_size: of the model, V.
            name: one of `FORMS`, which stands before the template; None: what the template writes says it.
            ends: tokens that end a text beside EOS.

        Raises:
            ValueError: there is neither template nor name, no such name, or the tokenizer lacks the form's tokens.
        """
        if name is not None and name not in FORMS:
            raise ValueError(f"there is no chat format {shown(repr(name))}; the formats are {', '.join(FORMS)}")
        if name is None and template is None:
            raise ValueError(f"the model has no chat template; name a format: {', '.join(FORMS)}")
        if name is not None:
            self.name, self._form, self._template = name, FORMS[name], FORMS[name]
        else:
            assert template is not None
            self.name, self._template = recognised(template), template
            opens = self.name != "r1" or THINK in template.source
            self._form = FORMS.get(self.name) if opens else deepseek_chat.R1_UNOPENED
        missing = [token for token in deepseek_chat.TURNS if token not in tokenizer.special_ids]
        if self._form is not None and missing:
            raise ValueError(
                f"the tokenizer has no token {missing[0]!r}, which the chat format {self.name} writes; give a"
                " template of the model's own, a .jinja file"
            )
        self._tokenizer = tokenizer
        self.grammars = Grammars(tokenizer, vocab_size, ends)
        self._constraints = Constraints(tokenizer, self.grammars, self.name)

    @property
    def template_text(self) -> str:
        """The template, in Jinja."""
        return self._template.source

    def reads(self, variable: str) -> bool:
        """Return whether the template knows a variable of a request, such as `reasoning_effort`."""
        return self._template.reads(variable)

    def prepare(
        self,
        messages: Any,
        *,
        tools: Any = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool = True,
        response_format: Any = None,
        variables: Mapping[str, Any] | None = None,
        continues: bool = False,
    ) -> Chat:
        """Return the prompt of a conversation, and how its reply is constrained and read.

        Args:
            messages, tools, tool_choice, parallel_tool_calls, response_format: as OpenAI's API has them in JSON.
            variables: further ones of the template, such as V3.1's `thinking`.
            continues: the reply goes on with the last message, the assistant's.

        Raises:
            ValueError: one of them is wrong, or the model has no form for it.
        """
        for name, value in (
            *(("messages", messages), ("tools", tools), ("tool_choice", tool_choice)),
            *(("response_format", response_format), ("chat_template_kwargs", variables)),
        ):
            check_depth(value, name)
        conversation = read_messages(messages)
        choice = read_choice(tools, tool_choice, parallel_tool_calls)
        if continues:
            check_continued(conversation[-1])
        prompt = self._encode(conversation, choice, dict(variables or {}), continues)
        thinking = self._opened(prompt)
        grammar = self._constraints.make(choice, response_format, thinking)
        if continues and grammar is not None:
            raise ValueError(
                "continue_final_message is for texts without a form; leave response_format and tool_choice out"
            )
        names = STRUCTURE if choice.tools else (THINK, END_THINK)
        ids = self._tokenizer.special_ids
        spelled = {ids[name]: mark(name) for name in names if name in ids}
        marks = {mark(name): name for name in names if name in ids}
        if THINK not in ids and END_THINK in self._template.source:
            marks |= {name: name for name in (THINK, END_THINK)}
        return Chat(prompt, grammar, spelled, lambda: ReplyReader(marks, thinking))

    def _encode(
        self, messages: list[dict[str, Any]], choice: Choice, variables: dict[str, Any], continues: bool
    ) -> list[int]:
        template = self._template
        knows_tools = template.reads("tools")
        if choice.tools and (self._form is None or not set(STRUCTURE[2:]) <= self._tokenizer.special_ids.keys()):
            raise ValueError(
                "it is not known how this model calls tools; leave tools out, or start the server with the name of its"
                f" chat format: {', '.join(FORMS)}"
            )
        told = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if (choice.tools or told) and not knows_tools and self._form is not None:
            template = self._form
        if told and _ARGUMENTS_AS_OBJECT.search(template.source):
            messages = [_with_objects(message) for message in messages]
        if reserved := variables.keys() & RESERVED:
            raise ValueError(f"the template's variable {min(reserved)} cannot be set")
        variables["tools"] = choice.described or None
        return template.encode(self._tokenizer, messages, not continues, continues, **variables)

    def _opened(self, prompt: list[int]) -> bool:
        """Return whether the prompt ends in reasoning that is open."""
        think = self._tokenizer.special_ids.get(THINK)
        pieces = self._tokenizer.token_bytes
        return next((token == think for token in reversed(prompt) if not pieces[token].isspace()), False)


def check_continued(message: Mapping[str, Any]) -> None:
    """Refuse to go on with a message that is no answer of the assistant.

    Raises:
        ValueError: it is another one's, calls tools, or has reasoning, whose tokens only a model writes.
    """
    if message["role"] != "assistant" or "tool_calls" in message:
        kind = "calls tools" if "tool_calls" in message else f"is of the role {message['role']}"
        raise ValueError(f"continue_final_message is true, and the last message {kind}; end with an answer's beginning")
    if found := [token for token in (THINK, END_THINK) if token in message["content"]]:
        raise ValueError(f"continue_final_message goes on with answers, not with reasoning; leave {found[0]} out")


def open_chat_format(
    folder: Path | None,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    name: str | None = None,
    ends: Iterable[int] = (),
) -> ChatFormat | None:
    """Return the format of a model; None if its folder has no template and none is named.

    Args:
        folder: with tokenizer_config.json and perhaps chat_template.jinja.
        tokenizer, vocab_size, ends: as `ChatFormat`.
        name: one of `FORMS`, or the path of a template in Jinja.

    Raises:
        ValueError: the template is broken, there is no such format, or the tokenizer lacks its tokens.
    """
    rest = {"vocab_size": vocab_size, "ends": tuple(ends)}
    if name in FORMS:
        return ChatFormat(tokenizer, None, name=name, **rest)
    if name is not None:
        path = local_path(name, "--chat_template")
        if not path.is_file():
            raise ValueError(
                f"{shown(name)} is neither a file with a chat template nor a chat format; the formats are"
                f" {', '.join(FORMS)}"
            )
        names = {token_id: token for token, token_id in tokenizer.special_ids.items()}
        special = {"bos_token": names.get(tokenizer.bos), "eos_token": names.get(tokenizer.eos)}
        source = ChatTemplate(read_text(path), {key: token for key, token in special.items() if token is not None})
        return ChatFormat(tokenizer, source, **rest)
    if folder is None or not _has_template(folder):
        return None
    return ChatFormat(tokenizer, ChatTemplate.load(folder), **rest)


def recognised(template: ChatTemplate) -> str:
    """Return the name of a template's format, by what it writes."""
    if not all(token in template.source for token in deepseek_chat.TURNS):
        return OTHER
    if template.reads("thinking"):
        return "v3.1"
    return "r1" if END_THINK in template.source or THINK in template.source else "v3"


def _has_template(folder: Path) -> bool:
    config = folder / CONFIG_NAME
    return os.path.lexists(folder / TEMPLATE_FILE) or (
        os.path.lexists(config) and read_json(config).get("chat_template") is not None
    )


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose calls have their arguments as objects, where they are JSON."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}
