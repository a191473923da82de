"""A client that streams from an OpenAI-compatible server, with the standard library: what the load generator measures.

Each request has a connection of its own, whose making counts. An HTTP client with a pool would let a request wait
inside this program for a connection, and hide it.
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deepseek_jax.inputs import shown
from experiments.benchmarks.load import Arrival, Asked, Target

MOST_OF_AN_ERROR = 10_000  # bytes that are read of one
LONGEST_LINE = 1 << 24  # bytes, of an event


class Server(NamedTuple):
    """Where a server is.

    Attributes:
        prefix: of the path, such as "/v1".
    """

    host: str
    port: int
    prefix: str
    secure: bool
    key: str | None = None


def parse_url(text: str, key: str | None) -> Server:
    """Return the server of an address such as "http://127.0.0.1:8000"; "/v1" is added where there is no path.

    Raises:
        ValueError: it is no address of HTTP or HTTPS.
    """
    try:
        url = urlsplit(text)
        port = url.port or {"http": 80, "https": 443}[url.scheme]
    except (ValueError, KeyError):
        url, port = None, 0
    if url is None or not url.hostname or url.query or url.fragment or url.username:
        raise ValueError(f"--url={shown(text)} is no address of a server; write http://127.0.0.1:8000")
    return Server(url.hostname, port, url.path.rstrip("/") or "/v1", url.scheme == "https", key)


async def get_json(server: Server, path: str) -> Any:
    """Return the JSON value of a path behind the server's prefix.

    Raises:
        RuntimeError, OSError: the server refuses, or cannot be reached.
    """
    async with _respond(server, "GET", path, b"") as pieces:
        return json.loads(b"".join([piece async for piece in pieces]))


def target(server: Server, model: str, options: dict[str, Any]) -> Target:
    """Return what asks a server: for a completion of ids or a text, or for a chat where the prompt is messages.

    Args:
        options: further fields of every request, such as `temperature`. A server whose chunks have the usage so far
            (`continuous_usage_stats`) is measured token by token, others chunk by chunk.
    """

    async def ask(asked: Asked) -> AsyncIterator[Arrival]:
        is_chat = isinstance(asked.prompt, list) and isinstance(asked.prompt[0], dict)
        path, name = ("/chat/completions", "messages") if is_chat else ("/completions", "prompt")
        body = {"model": model, name: asked.prompt, "max_tokens": asked.max_new_tokens, **options}
        body |= {"stream": True}
        tokens = 0
        async with _respond(server, "POST", path, json.dumps(body).encode()) as pieces:
            async for data in _events(pieces):
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if event.get("error"):
                    raise RuntimeError(_message(data))
                choices, before = event.get("choices") or [], tokens
                is_text = any(map(_has_text, choices))
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens + is_text)
                yield Arrival(is_text or (bool(choices) and tokens > before), tokens)
        raise RuntimeError("the stream ended before [DONE]")

    return ask


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any([choice.get("text"), *(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))])


def _message(body: str) -> str:
    """Return what an error says."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return shown(body)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield the `data` of each server-sent event; OpenAI's servers write it in one line."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


@contextlib.asynccontextmanager
async def _respond(server: Server, method: str, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
    """Send a request over a new connection; the context's value yields the body of the response as it comes.

    Raises:
        RuntimeError: the status is not 200; the message is the server's.
        OSError: there is no connection.
    """
    secure = ssl.create_default_context() if server.secure else None
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=secure, limit=LONGEST_LINE)
    try:
        key = [f"Authorization: Bearer {server.key}"] if server.key else []
        lines = [f"{method} {server.prefix}{path} HTTP/1.1", f"Host: {server.host}:{server.port}", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", *key, "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        await writer.drain()
        status = (await reader.readline()).split()
        if len(status) < 2 or not status[1].isdigit():
            raise RuntimeError("this is no HTTP server")
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip().lower()
        length = int(headers["content-length"]) if "content-length" in headers else None
        pieces = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _rest(reader, length)
        if status[1] != b"200":
            text = b"".join([piece async for piece in pieces])[:MOST_OF_AN_ERROR].decode(errors="replace")
            raise RuntimeError(f"{status[1].decode()}: {_message(text)}")
        yield pieces
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)  # the line's end


async def _rest(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
    left = 2**63 if length is None else length
    while left and (piece := await reader.read(min(left, 1 << 16))):
        left -= len(piece)
        yield piece
