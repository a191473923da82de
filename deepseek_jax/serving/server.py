"""The server as a process: its socket, slow clients, signals, and an end at which no answer is cut off."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek_jax.inputs import is_loopback, shown
from deepseek_jax.serving.door import LOOPBACK_NAMES, Door
from deepseek_jax.serving.service import Service

HEAD_SECONDS = 20.0  # in which a client must have sent the head of a request
UNREAD_SECONDS = 60.0  # for which a client may leave unread what was sent to it
KEEP_SECONDS = 30  # for which a connection waits for its next request
SHUTDOWN_SECONDS = 5  # for connections to close when their answers are complete
POLL_SECONDS = 0.05


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, not listening yet; port 0 takes a free one.

    Raises:
        ValueError: the address is none of this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host={shown(host)} is not an address of this machine ({error}); give another") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            told = f"--port={port} is taken on {shown(host)}; give another, or --port=0 for a free one"
        else:
            told = f"{shown(host)} port {port} cannot be served ({error.strerror}); give another --host or --port"
        raise ValueError(told) from error
    return bound


def host_names(host: str) -> set[str] | None:
    """Return what the Host header may say to a server at `host`; None for anything."""
    return {*LOOPBACK_NAMES, host.lower()} if is_loopback(host) else None


class Server:
    """Serves an application until it is told to stop."""

    def __init__(self, door: Door, service: Service, bound: socket.socket, drain_seconds: float):
        """Do nothing yet.

        Args:
            bound: see `bind`.
            drain_seconds: for which running requests may go on after the signal to stop.
        """
        self._door, self._service, self._socket, self._drain_seconds = door, service, bound, drain_seconds
        host, port = bound.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        config = uvicorn.Config(
            door,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        self._uvicorn = _Uvicorn(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._signal: signal.Signals | None = None

    def run(self, ready: Callable[[str], None] = print, tell: Callable[[str], None] = print) -> signal.Signals | None:
        """Serve; return the signal that ended it, or None after `stop`.

        Args:
            ready: called with the address when requests are answered.
            tell: takes lines for the person in front of it.
        """
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(self._serve(ready, tell))
        return self._signal

    def stop(self) -> None:
        """Drain and end, from any thread."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self, ready: Callable[[str], None], tell: Callable[[str], None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self._on_signal, number, tell)
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._socket]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(POLL_SECONDS)
        if not serving.done():
            ready(self.url)
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await self._drain()
        self._uvicorn.end()
        await serving

    async def _drain(self) -> None:
        """Answer what runs, refuse what comes, and end the engine; at the end of the time what still runs is told."""
        self._door.close()
        end = time.monotonic() + self._drain_seconds
        while self._service.metrics.active and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.to_thread(self._service.model.engine.close)
        end = time.monotonic() + SHUTDOWN_SECONDS
        while self._service.metrics.active and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)

    def _on_signal(self, number: signal.Signals, tell: Callable[[str], None]) -> None:
        assert self._stop is not None
        if self._signal is not None:
            print(f"\n{number.name}: stopped at once", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(128 + number)
        self._signal = number
        tell(
            f"{number.name}: no new requests; {self._service.metrics.active} have up to {self._drain_seconds:g} s to"
            " end; a second one stops at once"
        )
        self._stop.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signals: `Server` has them."""

    @contextlib.contextmanager
    def capture_signals(self):
        """Leave the signals alone."""
        yield

    def end(self) -> None:
        """Close the socket and the connections."""
        self.should_exit = True


class _Protocol(H11Protocol):
    """uvicorn's HTTP over h11, which drops clients that do not send their request or do not read the answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._unread: asyncio.TimerHandle | None = None
        self._head: asyncio.TimerHandle | None = None
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, if it is not complete."""
        super().data_received(data)
        self._expect_head()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on, as the client has read."""
        super().resume_writing()
        self._unread = _cancelled(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._unread, self._head = _cancelled(self._unread), _cancelled(self._head)
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
