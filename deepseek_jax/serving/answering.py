"""From deltas to an answer: in chunks as they come, or whole. The whole answer is made of the chunks."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deepseek_jax.inference.job import CANCELLED, DEADLINE, ERROR, LENGTH, Delta, Job
from deepseek_jax.inputs import shown
from deepseek_jax.serving.answers import Answers, closing
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.events import EventStream, unless_gone
from deepseek_jax.serving.jobs import Wishes
from deepseek_jax.serving.service import Service
from deepseek_jax.serving.usage import UsageSum

CLIENT_GONE = 499  # nginx's status for the log; nobody reads it


class Choice(Protocol):
    """One text of an answer."""

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """Return what a delta adds, as entries of `choices` in chunks."""
        ...

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the entry of `choices` in a whole answer, from all that `push` returned."""
        ...


class Form(NamedTuple):
    """What the answers of an endpoint are called."""

    prefix: str  # of ids
    whole: str
    chunk: str


class Answer:
    """The answer to one request."""

    def __init__(self, service: Service, form: Form, wishes: Wishes, jobs: Sequence[Job], choices: Sequence[Choice]):
        """Make an answer of `choices`, one for each of `jobs`."""
        self._service, self._form, self._wishes, self._choices = service, form, wishes, choices
        self._jobs = jobs
        self._usage = UsageSum(wishes.num_choices)
        self._id, self._created = form.prefix + secrets.token_hex(12), int(time.time())
        self._began = time.monotonic()
        self._last: list[float | None] = [None] * len(jobs)
        self._version = 0

    async def respond(self, request: Request) -> Response:
        """Return the response.

        Raises:
            ApiError: the engine refuses the jobs, or one of them failed and the answer is not a stream.
        """
        notes = request.scope.setdefault("notes", {})
        notes["id"], notes["usage"] = self._id, self._usage
        service = self._service
        answers = Answers(service.model.engine, service.mailbox, self._jobs, service.limits.heartbeat_seconds)
        if self._wishes.stream:
            return EventStream(answers, self._chunks(answers))  # type: ignore[return-value]  # an ASGI application
        with answers:
            body = await unless_gone(request.receive, self._whole(answers))
        return Response(status_code=CLIENT_GONE) if body is None else JSONResponse(body)

    async def _whole(self, answers: Answers) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for arrived in self._parts(answers):
            if arrived is not None:
                parts[arrived[0]] += arrived[1]
        merged = [choice.merge(own) for choice, own in zip(self._choices, parts, strict=True)]
        return self._body(self._form.whole, merged) | {"usage": self._usage.body()}

    async def _chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any] | None]:
        """Yield chunks, and None where nothing was sent for long: tokens may come whose text is held back."""
        wishes, sent = self._wishes, time.monotonic()
        async for arrived in self._parts(answers):
            parts = () if arrived is None else arrived[1]
            if parts or time.monotonic() - sent >= self._service.limits.heartbeat_seconds:
                sent = time.monotonic()
                if not parts:
                    yield None
            for part in parts:
                chunk = self._body(self._form.chunk, [part])
                if wishes.usage_always:
                    chunk["usage"] = self._usage.body()
                elif wishes.usage_at_end:
                    chunk["usage"] = None
                yield chunk
        if wishes.usage_at_end:
            yield self._body(self._form.chunk, []) | {"usage": self._usage.body()}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.model.name,
            "system_fingerprint": f"weights-{self._version}",
            "choices": choices,
        }

    async def _parts(self, answers: Answers) -> AsyncIterator[tuple[int, list[dict[str, Any]]] | None]:
        """Yield the number of a choice and what it adds, or None for a heartbeat."""
        async for arrival in answers:
            if arrival is None:
                yield None
                continue
            number, delta = arrival
            self._observe(number, delta)
            check_end(delta, bool(self._usage.sums().completion_tokens))
            yield number, self._choices[number].push(delta)

    def _observe(self, number: int, delta: Delta) -> None:
        self._version = delta.version
        self._usage.note(number, delta.usage)
        if not delta.ids:
            return
        now, metrics, count = time.monotonic(), self._service.metrics, len(delta.ids)
        metrics.count_tokens(count)
        last = self._last[number]
        if last is None:
            metrics.first_token.observe(now - self._began)
            metrics.between_tokens.observe(0.0, count - 1)  # they came with the first
        else:
            metrics.between_tokens.observe((now - last) / count, count)
        self._last[number] = now


def check_end(delta: Delta, has_begun: bool) -> None:
    """Refuse an end that is no answer.

    Args:
        delta: the last of a job.
        has_begun: whether any text of the request has a token.

    Raises:
        ApiError: the job failed, the server ends, or the time was over before the first token of all texts.
    """
    if delta.finish_reason == ERROR:
        raise ApiError(500, shown(delta.error or "the engine could not make this text"), code="engine_error")
    if delta.finish_reason == CANCELLED:
        raise closing()
    if delta.finish_reason == DEADLINE and not has_begun:
        raise ApiError(408, "the time for this request was over before its first token", code="request_timeout")


def end_of(delta: Delta) -> tuple[str | None, dict[str, str]]:
    """Return the `finish_reason` in OpenAI's words, and what to add where they do not say it."""
    if delta.finish_reason == DEADLINE:
        return LENGTH, {"stop_reason": "deadline"}
    return delta.finish_reason, {}
