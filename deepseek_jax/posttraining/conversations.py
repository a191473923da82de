"""A conversation as examples to train on: only what the assistant says carries loss, with the token that ends it.

Where a reply begins and ends is never guessed from text. Everything comes from the ids that the chat template writes,
the same ids that a server sends and receives. For the reply r of message i:

    prompt   ids of messages 0 .. i - 1 and the opening of a reply      what the model reads when it answers
    turn     ids of messages 0 .. i                                     must begin with `prompt`
    reply    turn[len(prompt):], up to its last special token           carries loss; the rest is context

    <BOS> <User> h i <Assistant> y o <EOS> <User> b y e <Assistant> c u <EOS>
      0     0    0 0      0      1 1   1     0    0 0 0      0      1 1   1

So there is exactly one learned end token per reply, and what a reply is conditioned on is bit for bit what inference
conditions it on. Two replies share an example if the second one's prompt begins with the first one's ids. Else each
has an example of its own: R1's template, for one, drops the reasoning of earlier replies, so the reasoning is learned
where it is the last turn, and later turns are read without it.

Reasoning. If a reply holds `</think>` and the tokenizer has that token, `<think>` and `</think>` become tokens and not
text, since that is what the model is to write: contents of other roles never do so. If the template opens every reply
with `<think>`, a reply without reasoning gets an empty one: "<think>\\n" is in the prompt, and "\\n</think>\\n\\n"
before the answer is learned.

A template is refused, with the reason, if its turn does not begin with its prompt, or ends a reply without a special
token: a model that never learned to end goes on for ever. So is what the template does not read: calls of tools, or
reasoning beside the content, would be lost, and the reply learned without them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data import deepseek_chat
from deepseek_jax.data.chat import ChatTemplate, check_messages
from deepseek_jax.data.examples import Example
from deepseek_jax.data.tokenizer import THINK_TOKENS, Tokenizer
from deepseek_jax.inputs import local_path, read_text, shown

THINK, END_THINK = THINK_TOKENS
EMPTY_REASONING, AFTER_REASONING = "\n", "\n\n"
# For a tokenizer without tokens for turns, such as one that a run trained on its corpus. A user can spell a turn.
PLAIN = ChatTemplate(
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- 'Assistant:\\n' + message.content | trim + eos_token }}"
    "{%- elif message.role == 'system' %}{{- message.content | trim + '\\n\\n' }}"
    "{%- elif message.role == 'user' %}{{- 'User:\\n' + message.content | trim + '\\n\\n' }}"
    "{%- else %}{{- raise_exception('the plain template has no role ' + message.role) }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}"
)
TEMPLATES = {"v3": deepseek_chat.V3, "r1": deepseek_chat.R1, "v3.1": deepseek_chat.V3_1, "plain": PLAIN}
FOLDER = "folder"
TOOLS = "tools"  # a variable of templates
# Fields of a message beside role and content that only some templates read.
FIELDS = {
    "tool_calls": "use another template, or leave the turn out",
    "reasoning_content": f"write it into the content, as {THINK}reasoning{END_THINK}answer",
}


def find_template(name: str, folder: Path | None) -> ChatTemplate:
    """Return the template of a name: one of `TEMPLATES`, "folder", or the path of a .jinja file.

    Args:
        name: as `posttraining.sft.template`.
        folder: where "folder" looks; None if there is none.

    Raises:
        ValueError: there is no such template, or it is broken.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    choices = f"give one of {', '.join(TEMPLATES)}, 'folder', or the path of a .jinja file"
    if name == FOLDER:
        if folder is None:
            raise ValueError(f"template = 'folder' needs weights from a folder that has a chat template; {choices}")
        return ChatTemplate.load(folder)
    path = local_path(name, "template")
    if not path.is_file():
        raise ValueError(f"template = {shown(repr(name))} is not a template; {choices}")
    try:
        return ChatTemplate(read_text(path))
    except ValueError as error:
        raise ValueError(f"{shown(str(path))}: {error}") from error


def encode_conversation(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[Example]:
    """Return the examples of a conversation; what follows its last learned reply is left out.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: with `role` and `content`, of any number of turns; a reply with `weight` 0 is context alone.
        variables: of the template, such as `tools`.

    Raises:
        ValueError: no reply, an unknown role, an empty content, a field that would be lost, or a template that cannot
            be used (see the module).
    """
    _check(messages)
    _check_read(template, messages, variables)
    done: list[tuple[list[int], list[bool]]] = []
    for i, message in enumerate(messages):
        if not _is_learned(message):
            continue
        prompt, reply, num_learned = _reply(template, tokenizer, messages[: i + 1], variables)
        weights = [True] * num_learned + [False] * (len(reply) - num_learned)
        ids, before = done[-1] if done else ([], [])
        if done and prompt[: len(ids)] == ids:
            done[-1] = (prompt + reply, before + [False] * (len(prompt) - len(ids)) + weights)
        else:
            done.append((prompt + reply, [False] * len(prompt) + weights))
    return [Example(np.array(ids, np.int32), np.array(weights, bool)) for ids, weights in done]


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    check_messages(messages)
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role in ("user", "assistant") and not (content or "").strip() and not message.get("tool_calls"):
            raise ValueError(f"messages[{i}] of the {role} is empty; write its text, or leave the turn out")
    if not any(map(_is_learned, messages)):
        raise ValueError(
            "no message is the assistant's, or each has the weight 0, so there is nothing to learn; add a reply"
        )


def _check_read(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> None:
    """Refuse what would change what is learned, and is not read."""
    if variables.get(TOOLS) and not template.reads(TOOLS):
        raise ValueError(f"there are {TOOLS}, and the chat template does not read them; leave them out, or use another")
    for i, message in enumerate(messages):
        for key, remedy in FIELDS.items():
            if message.get(key) and not template.reads_field(key):
                raise ValueError(f"messages[{i}] has {key}, and the chat template does not read it; {remedy}")
        if message["role"] == "assistant" and message.get("weight") not in (None, 0, 1):
            raise ValueError(
                f"messages[{i}] has weight = {message['weight']!r}, and a reply is learned or not; write 1 or 0, or"
                " leave the field out"
            )


def _is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a message carries loss: replies do, except those with the weight 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _reply(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any]
) -> tuple[list[int], list[int], int]:
    """Return the ids of the prompt, those of the last message behind it, and how many of these carry loss."""
    context, message = list(messages[:-1]), messages[-1]
    prompt = _prompt(template, tokenizer, context, variables)
    has_reasoning = END_THINK in (message.get("content") or "") and END_THINK in tokenizer.special_ids
    opened = _last_special(tokenizer, prompt) == THINK
    if has_reasoning and _last_special(tokenizer, prompt) == END_THINK:
        raise ValueError(
            f"messages[{len(context)}] has reasoning, and the chat template ends its prompt with {END_THINK!r}; let it"
            ' open the reasoning, with "chat_template_kwargs": {"thinking": true} beside the messages'
        )
    if opened or has_reasoning:
        reply = _with_reasoning(template, tokenizer, context, message, opened, variables)
    else:
        turn = template.encode(tokenizer, [*context, message], add_generation_prompt=False, **variables)
        if turn[: len(prompt)] != prompt:
            raise ValueError(
                f"the chat template writes messages[{len(context)}] in another way than it opens a reply, so the tokens"
                f" to learn cannot be told: the prompt is {_told(tokenizer, prompt)} and the turn"
                f" {_told(tokenizer, turn)}; use a template whose replies continue its prompts"
            )
        reply = turn[len(prompt) :]
    special = set(tokenizer.special_ids.values())
    ends = [k for k, token in enumerate(reply) if token in special]
    inner = {tokenizer.special_ids.get(token) for token in THINK_TOKENS}
    if not ends or reply[ends[-1]] in inner:
        raise ValueError(
            f"the chat template ends messages[{len(context)}] without a special token ({_told(tokenizer, reply)}), so"
            " the model would never learn to stop; end replies with {{ eos_token }}"
        )
    return prompt, reply, ends[-1] + 1


def _prompt(
    template: ChatTemplate, tokenizer: Tokenizer, context: list[Mapping[str, Any]], variables: dict[str, Any]
) -> list[int]:
    if context:
        return template.encode(tokenizer, context, **variables)
    raise ValueError("messages[0] is the assistant's, and nothing comes before it; put the user's message there")


def _last_special(tokenizer: Tokenizer, ids: list[int]) -> str | None:
    """Return the last special token among ids, as text."""
    names = {token_id: name for name, token_id in tokenizer.special_ids.items()}
    return next((names[token] for token in reversed(ids) if token in names), None)


def _with_reasoning(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    context: list[Mapping[str, Any]],
    message: Mapping[str, Any],
    opened: bool,
    variables: dict[str, Any],
) -> list[int]:
    """Return the ids of a reply with its reasoning, which the template itself may drop, and what it writes behind it.

    Args:
        opened: whether the prompt ends with `<think>` and a line break.
    """
    content = message.get("content") or ""
    reasoning, found, answer = content.rpartition(END_THINK)
    if not found:
        reasoning, answer = EMPTY_REASONING, AFTER_REASONING + content
    elif opened:
        reasoning = re.sub(rf"^\s*{THINK}\n?", "", reasoning)
    ids = with_think_tokens(tokenizer, f"{reasoning}{END_THINK}{answer}")
    # What follows a reply does not depend on its text; a text without special form tells it.
    probe = [*context, {**message, "content": "x"}]
    whole = template.encode(tokenizer, probe, add_generation_prompt=False, **variables)
    open_end = template.encode(tokenizer, probe, add_generation_prompt=False, continue_final_message=True, **variables)
    if whole[: len(open_end)] != open_end:
        raise ValueError(
            f"the chat template joins a reply and what follows it into one token ({_told(tokenizer, whole)}); put a"
            " special token behind replies"
        )
    return ids + whole[len(open_end) :]


def with_think_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which `<think>` and `</think>` are tokens."""
    parts = re.split(f"({'|'.join(map(re.escape, THINK_TOKENS))})", text)
    ids: list[int] = []
    for part in parts:
        token = tokenizer.special_ids.get(part) if part in THINK_TOKENS else None
        ids += tokenizer.encode(part) if token is None else [token]
    return ids


def _told(tokenizer: Tokenizer, ids: list[int]) -> str:
    return shown(repr(tokenizer.decode(ids)))
