"""Server-sent events: an answer in chunks, each of them sent when it is there.

data: {"id": ..., "choices": [...]}      a chunk
: waiting                                a heartbeat, which clients skip
data: {"error": {...}}                   what went wrong, if something did
data: [DONE]                             always the end
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from deepseek_jax.serving.answers import Answers
from deepseek_jax.serving.errors import ApiError, internal

HEARTBEAT, DONE = b": waiting\n\n", b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # asks proxies to pass every chunk on
]


def event(chunk: dict[str, Any]) -> bytes:
    """Return a chunk as an event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


class EventStream:
    """The response of a stream: an ASGI application. When the client goes, the jobs are cancelled."""

    def __init__(self, answers: Answers, chunks: AsyncIterator[dict[str, Any] | None]):
        """Send `chunks` (None: a heartbeat), which come of `answers`."""
        self._answers, self._chunks = answers, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit the jobs, and send what they make; a refusal of the engine comes with its own status."""
        try:
            with self._answers:
                await unless_gone(receive, self._send(send))
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        fault: BaseException | None = None
        try:
            async for chunk in self._chunks:
                data = HEARTBEAT if chunk is None else event(chunk)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
        except Exception as error:
            fault = error
            await send({"type": "http.response.body", "body": event(internal().body()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE})
        if fault is not None:
            raise StreamFault("a stream ended early") from fault


class StreamFault(RuntimeError):
    """A fault of ours in a stream; its client was told."""


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns, or cancel it and return None when the client has gone."""
    gone = asyncio.ensure_future(_until_gone(receive))
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, doing}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (gone, doing):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
