"""A server that answers by a script: for tests of clients. It speaks as much of HTTP/1.1 as they need."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import NamedTuple


class Asked(NamedTuple):
    """A request, whole."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


class Reply(NamedTuple):
    """A response; a body that is an iterator is sent piece by piece, as it comes."""

    status: int
    headers: dict[str, str]
    body: bytes | AsyncIterator[bytes]


def reply_json(value, status: int = 200) -> Reply:
    return Reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def reply_events(events: AsyncIterator[bytes]) -> Reply:
    return Reply(200, {"Content-Type": "text/event-stream"}, events)


@contextlib.contextmanager
def serving(script: Callable[[Asked], Awaitable[Reply]]) -> Iterator[str]:
    """Serve by a script in a thread of its own; yields the URL. A body is closed when its reader leaves."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(lambda *ends: _connection(script, *ends), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        server.close()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


async def _connection(script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            status, sent, body = await script(Asked(method, path, headers, body))
            length = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {"Transfer-Encoding": "chunked"}
            lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in (sent | length).items())]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
            if isinstance(body, bytes):
                writer.write(body)
            else:
                await _stream(body, reader, writer)
            await writer.drain()
    writer.close()


async def _stream(pieces: AsyncIterator[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send pieces as chunks until they end, or until the other side is gone."""
    gone = asyncio.ensure_future(reader.read(1))
    try:
        while True:
            piece = asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait([piece, gone], return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                piece.cancel()
                raise ConnectionResetError
            if (data := piece.result()) is None:
                break
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
    finally:
        await _settle(gone)
        with contextlib.suppress(RuntimeError):
            await pieces.aclose()


async def _settle(task: asyncio.Future) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
