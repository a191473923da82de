"""`/v1/completions`: what follows prompts, in text or in ids."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.inference.completions import TokenLogprob
from deepseek_jax.inference.job import Delta
from deepseek_jax.inference.sampling import MOST_LOGPROBS
from deepseek_jax.serving.answering import Answer, Form, end_of
from deepseek_jax.serving.constraints import read_response_format
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.fields import Fields, checked_ids, wrong
from deepseek_jax.serving.jobs import LARGEST_INTEGER, check_count, check_room, make_jobs, read_wishes
from deepseek_jax.serving.model import Model
from deepseek_jax.serving.service import Service
from deepseek_jax.serving.token_logprobs import CompletionLogprobs, joined

FORM = Form("cmpl-", "text_completion", "text_completion")
DEFAULT_MAX_TOKENS = 16  # OpenAI's
NOT_DONE: dict[str, tuple[Any, ...]] = {"suffix": ("",), "prompt_embeds": (), "tools": ([],), "messages": ()}


class Prompt(NamedTuple):
    """A prompt as it came, and its ids."""

    text: str | None  # None where it came as ids
    ids: list[int]


def read_completion(service: Service, body: dict[str, Any]) -> Answer:
    """Return the answer to a body of `/v1/completions`.

    Raises:
        ApiError: the body cannot be answered.
    """
    model, fields = service.model, Fields(body)
    fields.refuse(NOT_DONE)
    wishes = read_wishes(fields, model)
    best_of = fields.integer("best_of", wishes.num_choices, 1, LARGEST_INTEGER)
    if best_of != wishes.num_choices:
        raise wrong("best_of", best_of, f"only n = {wishes.num_choices} texts are made; leave it out, or raise n")
    echo = fields.boolean("echo")
    num_logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    max_tokens = fields.integer("max_tokens", DEFAULT_MAX_TOKENS, 0, LARGEST_INTEGER)
    if max_tokens == 0 and not echo:
        raise wrong("max_tokens", 0, "nothing would come back; give at least 1, or echo = true")
    prompts = read_prompts(fields.get("prompt"), model, fields.boolean("add_special_tokens", True))
    check_count(model, len(prompts) * wishes.num_choices, "prompt" if len(prompts) > 1 else "n")
    for prompt in prompts:
        check_room(model, len(prompt.ids), max_tokens, "max_tokens")
    if echo and num_logprobs is not None and max_tokens == 1:
        # evaluations read prompt + 1 entries, also where the one token is EOS, which a text does not have
        wishes = wishes._replace(ignore_eos=True)
    jobs = make_jobs(
        wishes,
        [(prompt.ids, max_tokens) for prompt in prompts],
        time.monotonic() + service.limits.request_seconds,
        num_logprobs=num_logprobs,
        prompt_logprobs=(num_logprobs or 0) if echo and (num_logprobs is not None or max_tokens == 0) else None,
        grammar=grammar_of(model, fields),
    )
    choices = [
        CompletionChoice(i, model, prompts[i // wishes.num_choices], echo, num_logprobs is not None, wishes.token_ids)
        for i in range(len(jobs))
    ]
    return Answer(service, FORM, wishes, jobs, choices)


def grammar_of(model: Model, fields: Fields) -> Any:
    """Return the grammar that `response_format` asks for; None without one.

    Raises:
        ApiError: it cannot be met.
    """
    wanted = fields.get("response_format")
    if wanted is None:
        return None
    if model.grammars is None:
        raise ApiError(400, "response_format is not done for this model", param="response_format")
    try:
        schema = read_response_format(wanted)
        return None if schema is None else model.grammars.schema(schema, "response_format")
    except ValueError as error:
        raise ApiError(400, str(error), param="response_format", code="invalid_value") from error


def read_prompts(value: Any, model: Model, bos: bool) -> list[Prompt]:
    """Return the prompts of a body: a text, ids, or a list of either.

    Raises:
        ApiError: it is something else, empty, or has ids that no token has.
    """
    form = "write a text, a list of texts, a list of ids, or a list of lists of ids"
    if isinstance(value, str):
        return [_of_text(value, model, bos)]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", value, form)
    if type(value[0]) is int:
        return [_of_ids(value, model)]
    check_count(model, len(value), "prompt")
    if all(isinstance(one, str) for one in value):
        return [_of_text(one, model, bos) for one in value]
    if all(isinstance(one, list) for one in value):
        return [_of_ids(one, model) for one in value]
    raise wrong("prompt", value, form)


def _of_ids(ids: Any, model: Model) -> Prompt:
    if not ids:
        raise wrong("prompt", ids, "give at least one id")
    return Prompt(None, checked_ids("prompt", ids, model.vocab_size))


def _of_text(text: str, model: Model, bos: bool) -> Prompt:
    try:
        ids = model.encode(text, bos)
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
    if not ids:
        raise wrong("prompt", text, "give at least one character")
    return Prompt(text, ids)


class CompletionChoice:
    """One text of an answer."""

    def __init__(self, index: int, model: Model, prompt: Prompt, echo: bool, logprobs: bool, token_ids: bool):
        """Start a text."""
        self._index, self._model, self._prompt, self._token_ids = index, model, prompt, token_ids
        self._echo = echo
        self._lists = CompletionLogprobs(model) if logprobs else None

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """Return what a delta adds: nothing, or one entry."""
        text, lists = delta.text, []
        if self._echo:
            self._echo = False
            text = self._prompt_text() + text
            lists += self._prompt_lists(delta.prompt_logprobs)
        if self._lists is not None and delta.logprobs:
            lists.append(self._lists.push(delta.logprobs))
        reason, extra = end_of(delta)
        if not text and not lists and reason is None and not (self._token_ids and delta.ids):
            return []
        part = {"index": self._index, "text": text, "logprobs": None, "finish_reason": reason, **extra}
        if self._lists is not None:
            part["logprobs"] = joined(lists)
        if self._token_ids:
            part["token_ids"] = delta.ids
        return [part]

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole of all parts."""
        whole = parts[-1] | {"text": "".join(part["text"] for part in parts)}
        if self._lists is not None:
            whole["logprobs"] = joined([part["logprobs"] for part in parts])
        if self._token_ids:
            whole["token_ids"] = [token for part in parts for token in part["token_ids"]]
            whole["prompt_token_ids"] = self._prompt.ids
        return whole

    def _prompt_text(self) -> str:
        text, ids = self._prompt
        return self._model.tokenizer.decode(ids) if text is None else text

    def _prompt_lists(self, found: Sequence[TokenLogprob | None] | None) -> list[dict[str, list]]:
        if self._lists is None:
            return []
        text, ids = self._prompt
        bos = self._model.tokenizer.bos
        bos_added = ids[0] == bos and not (text or "").startswith(self._model.special_texts[bos])
        return [self._lists.prompt(ids, found or [None] * len(ids), text, bos_added)]
