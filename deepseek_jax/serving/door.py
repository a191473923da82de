"""Who may come in: the checks in front of every route, and the line of the log behind it.

- The Host header of a server on the loopback device must be a name of it. Else a page in the user's browser could, by a
  name that its owner points at 127.0.0.1 (DNS rebinding), read from the server.
- A key, compared in constant time. Without it, nothing is said of the model.
- A rate for each key, and so many requests at once.
- While the server ends, no new request.
"""

import contextlib
import hashlib
import hmac
import time
import traceback
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.inputs import shown
from deepseek_jax.serving.answers import closing
from deepseek_jax.serving.errors import ApiError, internal
from deepseek_jax.serving.service import Service

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
ALLOWED_METHODS = ("GET", "HEAD", "POST")
NO_STATUS = 0  # the client left before there was one


class Rates:
    """So many requests in a minute for each of several callers: a bucket of leave that fills by the second."""

    def __init__(self, per_minute: int):
        """Let `per_minute` requests through; 0 lets all."""
        self._most = per_minute
        self._left: dict[str, tuple[float, float]] = {}  # at a time

    def take(self, caller: str, now: float) -> float:
        """Return 0 and count a request, or the seconds until there is leave for it."""
        if not self._most:
            return 0.0
        left, then = self._left.get(caller, (float(self._most), now))
        left = min(self._most, left + (now - then) * self._most / 60)
        if left < 1:
            return (1 - left) * 60 / self._most
        if len(self._left) > 10_000:  # forget who has been away long enough to have all leave again
            self._left = {name: entry for name, entry in self._left.items() if now - entry[1] < 60}
        self._left[caller] = (left - 1, now)
        return 0.0


class Door:
    """ASGI middleware around all routes.

    Attributes:
        closing: no new request is taken.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        keys: Collection[str],
        open_paths: Collection[str],
        hosts: Collection[str] | None,
        origins: Collection[str],
        log: Callable[[str], None],
    ):
        """Guard `app`.

        Args:
            keys: one of them must come as "Authorization: Bearer"; none lets everybody in.
            open_paths: need no key and have no rate.
            hosts: names that the Host header may have; None for any.
            origins: pages of other servers that may call this one from a browser (CORS).
            log: takes one line for every request.
        """
        self._app, self._service, self._open, self._hosts, self._log = app, service, open_paths, hosts, log
        self._keys = [_digest(key) for key in keys]
        self._rates = Rates(service.limits.requests_per_minute)
        self._enter: ASGIApp = self._guard
        if origins:  # in front of the key, which a browser's first question does not have
            self._enter = CORSMiddleware(self._guard, list(origins), ALLOWED_METHODS, ["*"])
        self.closing = False

    def close(self) -> None:
        """Take no new requests."""
        self.closing = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._enter(scope, receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status = time.monotonic(), NO_STATUS

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["notes"] = {}
        metrics = self._service.metrics
        try:
            self._check(scope)
            with metrics.answering():
                await self._app(scope, receive, noting)
        except ApiError as error:
            await error.response()(scope, receive, noting)
        except Exception as error:
            self._log("".join(traceback.format_exception(error)).rstrip())
            if status == NO_STATUS:
                await internal().response()(scope, receive, noting)
        finally:
            self._note(scope, status, time.monotonic() - begun)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "the Host header names another machine", code="wrong_host")
        if self.closing and scope["path"] != "/metrics":
            raise closing()
        if scope["path"] in self._open:
            return
        caller = (scope.get("client") or ("",))[0]
        if self._keys:
            caller = self._caller(headers.get("authorization", ""))
        seconds = self._rates.take(caller, time.monotonic())
        if seconds:
            wait = max(1, round(seconds + 0.5))
            headers = {"Retry-After": str(wait)}
            message = f"too many requests in a minute; try again in {wait} s"
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        if self._service.metrics.active >= self._service.limits.requests:
            raise ApiError(429, "too many requests at once", code="too_many_requests", headers={"Retry-After": "1"})

    def _caller(self, authorization: str) -> str:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(matches):
            message = "the API key is missing or wrong; send it as: Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        return str(matches.index(True))

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        metrics = self._service.metrics
        metrics.count_response(path, status)
        notes = scope["notes"]
        words = [scope["method"], shown(scope["path"]), str(status or "gone"), f"{seconds:.3f}s"]
        if "usage" in notes:
            metrics.request.observe(seconds)
            usage = notes["usage"].sums()
            words += [
                notes["id"],
                f"prompt={usage.prompt_tokens}",
                f"cached={usage.cached_tokens}",
                f"completion={usage.completion_tokens}",
            ]
        with contextlib.suppress(OSError, ValueError):  # a log that cannot be written ends no request
            self._log(" ".join(words))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _name(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()
