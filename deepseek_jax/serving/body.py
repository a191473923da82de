"""The body of a request: read in pieces within limits of size and time, and parsed as JSON that we can use."""

import asyncio
import json
import sys
import time
from typing import Any

from starlette.requests import ClientDisconnect, Request

from deepseek_jax.inputs import shown
from deepseek_jax.serving.errors import ApiError

# What a body that is too large is read on for, and thrown away: a client that still writes may not read the refusal.
MOST_DISCARDED_BYTES, DISCARD_SECONDS = 1 << 30, 20.0
LONGEST_LINE = 200  # characters of a message of the parser


async def read_object(request: Request, most_bytes: int, seconds: float) -> dict[str, Any]:
    """Return the JSON object of a request's body.

    Raises:
        ApiError: 415 (another type, or compressed), 413, 408, or 400: it is not JSON in UTF-8, not an object, or has
            text that UTF-8 cannot write.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {shown(kind) or 'missing'}; send application/json")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, f"the body is compressed ({shown(coding)}); send it as it is")
    return parse(await read_bytes(request, most_bytes, seconds))


async def read_bytes(request: Request, most_bytes: int, seconds: float) -> bytes:
    """Return a body of at most `most_bytes` that comes within `seconds`.

    Raises:
        ApiError: 413 or 408.
    """
    too_large = ApiError(413, f"the body has more than {most_bytes:,} bytes; send less", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most_bytes and "expect" in request.headers:
        raise too_large  # the client waits for leave to send it
    pieces: list[bytes] = []
    size, end = 0, time.monotonic() + seconds
    stream = aiter(request.stream())
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), max(end - time.monotonic(), 0.001))
        except StopAsyncIteration:
            break
        except TimeoutError as error:
            if size > most_bytes:
                raise too_large from error
            headers = {"Connection": "close"}
            message = f"the body did not come within {seconds:g} s; send it faster"
            raise ApiError(408, message, code="body_too_slow", headers=headers) from error
        except ClientDisconnect as error:
            raise ApiError(400, "the body ended early") from error
        size += len(piece)
        if size <= most_bytes:
            pieces.append(piece)
        elif pieces:
            pieces.clear()
            end = time.monotonic() + DISCARD_SECONDS
        if size > MOST_DISCARDED_BYTES:
            raise too_large
    if size > most_bytes:
        raise too_large
    return b"".join(pieces)


def parse(content: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ApiError: 400.
    """
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
    except json.JSONDecodeError as error:
        told = shown(str(error))[:LONGEST_LINE]
        raise ApiError(400, f"the body is not JSON: {told}", code="invalid_json") from error
    except ValueError as error:  # Python's limit for integers
        message = f"the body has a number of more than {sys.get_int_max_str_digits():,} digits; write fewer"
        raise ApiError(400, message, code="invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is JSON, but no object; send one in braces", code="invalid_json")
    if b"\\u" in content:
        _refuse_surrogates(found)
    return found


def _refuse_constant(name: str) -> None:
    message = f"the body has {name}, which is not JSON; write a number, or null"
    raise ApiError(400, message, code="invalid_json")


def _refuse_surrogates(found: dict[str, Any]) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = r"the body has half of a surrogate pair (\ud800 to \udfff alone), which is no character"
        raise ApiError(400, message, code="invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
