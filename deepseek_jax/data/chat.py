"""Chat templates: a conversation to text, and to ids.

A template is a Jinja program that writes the turns of a conversation one after another. DeepSeek's is

    <BOS>system text<｜User｜>question<｜Assistant｜>reply<EOS><｜User｜>question<｜Assistant｜>

without a line break between turns. `data.deepseek_chat` has ours. `ChatTemplate.load` reads the template of a released
checkpoint.

The ids are not simply those of the rendered text: a user who writes "<｜Assistant｜>" into a message would end their
turn and speak for the model. Only what the template itself writes may become a special token, but the rendered text
does not say who wrote what. Rendering placeholders instead of the contents does not help, because templates look into
contents: R1's drops a reply's reasoning up to `</think>`. So we change the template, and contents pass through it
untouched. Where its program writes a special token, in literal text or in a string that it joins or assigns, we wrap
the token in a mark that no message can guess:

    {{ '<｜User｜>' + message.content.split('</think>')[-1] }}      the template
    {{ '#<｜User｜>#' + message.content.split('</think>')[-1] }}    with marks;
        the argument of a call is not written, so it has none

After rendering, marked tokens become ids and the rest is encoded as ordinary text. Some templates may write special
tokens in another way: these are noticed and refused.
"""

import datetime
import functools
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from deepseek_jax.data import jinja
from deepseek_jax.data.jinja import FAULTS, TIME, environment, told
from deepseek_jax.data.tokenizer import BOS, EOS, SPECIAL_FORM, Tokenizer
from deepseek_jax.inputs import read_json, read_text, shown

# Variables of a template that rendering sets itself.
RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"))
ROLES = ("system", "user", "assistant", "tool")
# Private use characters: no template takes them for spaces or letters.
MARK = f"\ue000{secrets.token_hex(16)}\ue000"
END = f"\ue001{secrets.token_hex(16)}\ue001"  # behind a content that goes on


class ChatTemplate:
    """A Jinja chat template, rendered as Hugging Face transformers renders it."""

    def __init__(self, source: str, special: Mapping[str, str] | None = None, moment: datetime.datetime | None = None):
        """Compile a template.

        Args:
            source: the template, in Jinja.
            special: its variables that name special tokens; `bos_token` and `eos_token` are V3's unless given.
            moment: that it writes as the present; None: that of each rendering.

        Raises:
            ValueError: `source` is not valid Jinja.
        """
        self.source, self.moment = source, moment
        self._special = {"bos_token": BOS, "eos_token": EOS} | dict(special or {})
        try:
            _compile(source, ())
        except FAULTS as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"the chat template is not valid Jinja: {told(error)}{line}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ChatTemplate":
        """Read the template of a folder, or of a `tokenizer_config.json`.

        A `chat_template.jinja` beside the config has priority over it.

        Raises:
            ValueError: there is no template, or its file is broken.
        """
        config_file = Path(path) / "tokenizer_config.json" if Path(path).is_dir() else Path(path)
        template_file = config_file.with_name("chat_template.jinja")
        config = read_json(config_file) if os.path.lexists(config_file) else {}
        if os.path.lexists(template_file):
            source, origin = read_text(template_file), template_file
        else:
            source, origin = config.get("chat_template"), config_file
        if isinstance(source, list):  # several, each with a name
            named = [entry for entry in source if isinstance(entry, dict)]
            source = {str(entry.get("name")): entry.get("template") for entry in named}.get("default")
        if not isinstance(source, str):
            raise ValueError(
                f"{shown(str(config_file))} has no chat_template and there is no {shown(str(template_file))};"
                " add one of them, or use V3, R1 or V3_1 of deepseek_jax.data.deepseek_chat"
            )
        names = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token")
        }
        try:
            return cls(source, {key: name for key, name in names.items() if isinstance(name, str)})
        except ValueError as error:
            raise ValueError(f"{shown(str(origin))}: {error}") from error

    def at(self, moment: datetime.datetime) -> "ChatTemplate":
        """Return the template with this moment as the present, whenever it is rendered."""
        return ChatTemplate(self.source, self._special, moment)

    def reads(self, name: str) -> bool:
        """Return whether the template reads a variable that it does not set itself."""
        return name in jinja.variables(self.source)

    def reads_field(self, name: str) -> bool:
        """Return whether the template reads a field of messages."""
        read = jinja.fields(self.source)
        return read is None or name in read

    def render(
        self, messages: Sequence[Mapping[str, str]], /, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: mappings with a `role` and a `content`, which may be None beside `tool_calls`.
            add_generation_prompt: whether the text ends with the opening of the assistant's next reply.
            variables: other variables of the template.

        Raises:
            ValueError: a message lacks role or content, or the template refuses the conversation.
        """
        check_messages(messages)
        return self._run((), messages, add_generation_prompt, self._time() | variables)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, str]],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Return the ids of a conversation; the arguments are those of `render`.

        With `continue_final_message` they end with the last message's content, so that it can go on.

        Only the template makes special tokens. Spelled out in a message they are ordinary text. That is also true of
        `<think>`: keep the ids of reasoning that the model wrote, do not read them back from text.

        Raises:
            ValueError: as for `render`; or the template writes special tokens that the tokenizer lacks, or that cannot
                be told from contents; or it does not write the content that is to go on.
        """
        if continue_final_message:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + END}]
        variables = self._time() | variables  # one time in all renderings
        text = self.render(messages, add_generation_prompt, **variables)
        ids, tokens = tokenizer.special_ids, tuple(tokenizer.special_ids)
        harmless = [
            {
                key: value if key == "role" else "x" if key == "content" and value else _harmless(value, tokens)
                for key, value in message.items()
            }
            for message in messages
        ]
        others = {key: _harmless(value, tokens) for key, value in variables.items()}
        for unmarked in _split(self._run(tokens, harmless, add_generation_prompt, others))[::2]:
            token = next((token for token in tokens if token in unmarked), None) or next(
                iter(SPECIAL_FORM.findall(unmarked)), None
            )
            if token is not None:
                known = (
                    "in a way that cannot be told from a message's own text"
                    if token in ids
                    else "and the tokenizer has no such token"
                )
                raise ValueError(f"the chat template writes {token!r} {known}")
        parts = _split(self._run(tokens, messages, add_generation_prompt, variables))
        if "".join(parts) != text or not ids.keys() >= set(parts[1::2]):
            raise ValueError(
                "the chat template computes with the special tokens it writes; they cannot be told from a message's"
                " own text"
            )
        parts = _until_end(parts) if continue_final_message else parts
        return [i for k, part in enumerate(parts) for i in ([ids[part]] if k % 2 else tokenizer.encode(part))]

    def _time(self) -> dict[str, Any]:
        return {TIME: (self.moment or datetime.datetime.now()).strftime}

    def _run(
        self,
        tokens: tuple[str, ...],
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool,
        variables: dict,
    ) -> str:
        """Return the rendered text with `tokens` marked."""
        special = {key: _marked(name, tokens) for key, name in self._special.items()}
        variables = {"tools": None, "documents": None, **special, **variables}
        try:
            return _compile(self.source, tokens).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except FAULTS as error:
            raise ValueError(f"the chat template cannot render these messages: {told(error)}") from error


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError unless every message has one of `ROLES` and a text, or calls of tools."""
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(f"messages = {messages!r} must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}] = {message!r} must be a mapping with role and content")
        if message.get("role") not in ROLES:
            raise ValueError(f"messages[{i}] has role {message.get('role')!r}; roles are {', '.join(ROLES)}")
        calls = message.get("role") == "assistant" and message.get("content") is None and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not calls:
            raise ValueError(
                f"messages[{i}] has content {message.get('content')!r}; it must be a string, or None beside tool_calls"
            )


def _harmless(value: Any, tokens: tuple[str, ...]) -> Any:
    """Return `value` with an "x" for every special token that a text in it spells."""
    match value:
        case str():
            return _spelled(tokens).sub("x", value)
        case Mapping():
            return {_harmless(key, tokens): _harmless(item, tokens) for key, item in value.items()}
        case list() | tuple():
            return [_harmless(item, tokens) for item in value]
    return value


@functools.lru_cache(maxsize=16)
def _spelled(tokens: tuple[str, ...]) -> re.Pattern:
    """Return what finds special tokens in a text: `tokens`, and what has their form."""
    return re.compile("|".join([*map(re.escape, sorted(tokens, key=len, reverse=True)), SPECIAL_FORM.pattern]))


def _split(text: str) -> list[str]:
    """Return text, token, text, token, ..., text."""
    return re.split(f"{MARK}(.*?){MARK}", text, flags=re.DOTALL)


def _until_end(parts: list[str]) -> list[str]:
    """Return texts and tokens up to the last `END`."""
    last = max((k for k, part in enumerate(parts) if END in part), default=None)
    if last is None:
        raise ValueError("the chat template does not write the last message as it is, so it cannot be continued")
    return [*parts[:last], parts[last].rpartition(END)[0]]


def _marked(text: str, tokens: tuple[str, ...]) -> str:
    """Return `text` with every token in marks; if several match, the longest."""
    longest_first = sorted((token for token in tokens if token in text), key=len, reverse=True)
    if not longest_first:
        return text
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: MARK + match[0] + MARK, text)


@functools.lru_cache(maxsize=16)
def _compile(source: str, tokens: tuple[str, ...]) -> jinja2.Template:
    """Compile a template, with `tokens` marked wherever it writes them."""
    program = environment().parse(source)
    for statement in program.find_all((nodes.Output, nodes.Assign)):
        for expression in statement.nodes if isinstance(statement, nodes.Output) else [statement.node]:
            _mark(expression, tokens)
    return jinja2.Template.from_code(environment(), environment().compile(program), environment().make_globals(None))


def _mark(expression: nodes.Expr, tokens: tuple[str, ...]) -> None:
    """Mark the literals that become part of the value of an expression.

    Conditions do not, nor do the arguments of calls and filters, but those of `namespace`, which assigns them.
    """
    match expression:
        case nodes.TemplateData():
            expression.data = _marked(expression.data, tokens)
        case nodes.Const(value=str()):
            expression.value = _marked(expression.value, tokens)
        case nodes.Add():
            _mark(expression.left, tokens)
            _mark(expression.right, tokens)
        case nodes.Concat():
            for part in expression.nodes:
                _mark(part, tokens)
        case nodes.CondExpr():
            _mark(expression.expr1, tokens)
            if expression.expr2 is not None:
                _mark(expression.expr2, tokens)
        case nodes.Filter() if expression.node is not None:
            _mark(expression.node, tokens)
        case nodes.Call(node=nodes.Name(name="namespace")):
            for variable in expression.kwargs:
                _mark(variable.value, tokens)
