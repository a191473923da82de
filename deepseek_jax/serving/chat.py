"""`/v1/chat/completions`: the next reply of a conversation."""

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deepseek_jax.data.chat import RESERVED
from deepseek_jax.inference.job import Delta
from deepseek_jax.inference.sampling import MOST_LOGPROBS
from deepseek_jax.serving.answering import Answer, Form, end_of
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.fields import Fields, wrong
from deepseek_jax.serving.jobs import LARGEST_INTEGER, check_count, check_room, make_jobs, read_wishes
from deepseek_jax.serving.model import Model
from deepseek_jax.serving.reply import CallArguments, CallStart, Content, Piece, Reasoning, ReplyReader
from deepseek_jax.serving.service import Service
from deepseek_jax.serving.token_logprobs import chat_logprobs

if TYPE_CHECKING:
    from deepseek_jax.serving.chat_format import Chat

FORM = Form("chatcmpl-", "chat.completion", "chat.completion.chunk")
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "verbosity": ("medium",),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "include_reasoning": (True,),
    "prompt": (),
}
MOST_TEMPLATE_FIELDS = 64
FIELD, FIELDS = re.compile(r"\w+"), ("tools", "tool_choice", "response_format", "continue_final_message")


def read_chat(service: Service, body: dict[str, Any]) -> Answer:
    """Return the answer to a body of `/v1/chat/completions`.

    Raises:
        ApiError: the body cannot be answered.
    """
    model, fields = service.model, Fields(body)
    fields.refuse(NOT_DONE)
    wishes = read_wishes(fields, model)
    check_count(model, wishes.num_choices, "n")
    num_logprobs = read_logprobs(fields)
    chat = prepare(model, fields)
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    max_tokens = check_room(model, len(chat.prompt), fields.integer(name, None, 1, LARGEST_INTEGER), name)
    jobs = make_jobs(
        wishes,
        [(list(chat.prompt), max_tokens)],
        time.monotonic() + service.limits.request_seconds,
        num_logprobs=num_logprobs,
        grammar=chat.grammar,
        spelled=chat.spelled,
    )
    choices = [ChatChoice(i, model, chat.reader(), num_logprobs is not None) for i in range(len(jobs))]
    return Answer(service, FORM, wishes, jobs, choices)


def read_logprobs(fields: Fields) -> int | None:
    """Return how many of the most probable tokens come with each; None for no log-probabilities.

    Raises:
        ApiError: `top_logprobs` comes without `logprobs`, or one of them is wrong.
    """
    asked = fields.boolean("logprobs")
    count = fields.integer("top_logprobs", None, 0, MOST_LOGPROBS)
    if count and not asked:
        raise wrong("top_logprobs", count, "it needs logprobs = true")
    return (count or 0) if asked else None


def prepare(model: Model, fields: Fields) -> "Chat":
    """Return a conversation as a prompt, and how to read its reply.

    Raises:
        ApiError: the model knows no conversations, or this one is wrong.
    """
    if model.chat is None:
        message = f"{model.name} has no chat template; use /v1/completions"
        raise ApiError(400, message, code="no_chat_template")
    variables = fields.object("chat_template_kwargs") or {}
    if len(variables) > MOST_TEMPLATE_FIELDS:
        raise wrong("chat_template_kwargs", variables, f"give at most {MOST_TEMPLATE_FIELDS}")
    if reserved := variables.keys() & RESERVED:
        raise wrong("chat_template_kwargs", variables, f"{min(reserved)} cannot be set here")
    effort = fields.text("reasoning_effort")
    if effort is not None:
        if not model.chat.reads("reasoning_effort"):
            message = "the chat template of this model knows no reasoning_effort; leave it out"
            raise ApiError(400, message, param="reasoning_effort", code="unsupported_value")
        variables = {"reasoning_effort": effort} | variables
    continues = fields.boolean("continue_final_message")
    if fields.boolean("add_generation_prompt", not continues) is continues:
        raise wrong("add_generation_prompt", continues, "leave it out: continue_final_message alone decides")
    if fields.get("messages") is None:
        raise wrong("messages", None, "write a list of messages")
    try:
        return model.chat.prepare(
            fields.get("messages"),
            tools=fields.get("tools"),
            tool_choice=fields.get("tool_choice"),
            parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
            response_format=fields.get("response_format"),
            variables=variables,
            continues=continues,
        )
    except ValueError as error:
        # its first word is the field: "tools[0].function ..."
        named = FIELD.match(str(error))
        param = named[0] if named and named[0] in FIELDS else "messages"
        raise ApiError(400, str(error), param=param, code="invalid_value") from error


class ChatChoice:
    """One reply of an answer."""

    def __init__(self, index: int, model: Model, reader: ReplyReader, logprobs: bool):
        """Start a reply."""
        self._index, self._model, self._reader, self._logprobs = index, model, reader, logprobs
        self._begun = False

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """Return what a delta adds: an entry for each piece, and one for the end."""
        pieces = self._reader.push(delta.text)
        reason, extra = end_of(delta)
        if reason is not None:
            pieces = pieces + self._reader.finish()
            reason = self._reader.finish_reason(reason)
        found = chat_logprobs(self._model, delta.logprobs) if self._logprobs and delta.logprobs else []
        parts = []
        if not self._begun and (pieces or found or reason is not None):
            self._begun = True
            parts.append(self._part({"role": "assistant", "content": ""}))
        parts += [self._part(spoken(piece)) for piece in pieces]
        if found:  # with the first piece, or alone where the text is held back
            if not pieces:
                parts.append(self._part({}))
            parts[-max(len(pieces), 1)]["logprobs"] = {"content": found, "refusal": None}
        if reason is not None:
            parts.append(self._part({}, reason) | extra)
        return parts

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole of all parts."""
        deltas = [part["delta"] for part in parts]
        calls: list[dict[str, Any]] = []
        for call in (call for delta in deltas for call in delta.get("tool_calls", ())):
            if "id" in call:
                calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        content = "".join(delta.get("content", "") for delta in deltas)
        reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        if not content and (calls or reasoning):
            message["content"] = None
        whole = {key: value for key, value in parts[-1].items() if key != "delta"} | {"message": message}
        if self._logprobs:
            found = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
            whole["logprobs"] = {"content": found, "refusal": None}
        return whole

    def _part(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": reason}


def spoken(piece: Piece) -> dict[str, Any]:
    """Return a piece as the `delta` of a chunk."""
    match piece:
        case Reasoning(text):
            return {"reasoning_content": text}
        case Content(text):
            return {"content": text}
        case CallStart(index, id_, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
