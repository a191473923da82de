"""The coordinator in a process of its own: it outlives process 0 for as long as somebody needs it."""

import signal
import socket
import subprocess

import pytest

from deepseek_jax.parallel import coordinator
from tests.support.patience import SECONDS


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def started(monkeypatch):
    """The children that a test started; none is left."""
    children = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            children.append(self)

    monkeypatch.setattr(coordinator.subprocess, "Popen", Popen)
    yield children
    for child in children:
        child.kill()
        child.stdin.close()
        child.wait()


def test_it_serves_until_process_0_is_gone_and_nobody_is_connected(port, started):
    assert coordinator.start(f"localhost:{port}", 2, {"heartbeat_timeout": 60})
    (child,) = started
    with socket.create_connection(("localhost", port)):
        child.send_signal(signal.SIGTERM)  # which a scheduler sends to all processes of a job
        child.stdin.close()  # as the end of process 0 does
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
    assert child.wait(SECONDS) == 0


def test_a_service_that_cannot_start_is_an_error_with_its_reason(started):
    """The exception of jaxlib, or where jaxlib crashes instead, the last line of its log."""
    with pytest.raises(coordinator.CoordinatorError, match="Failed to start RPC server|Failed to add port to server"):
        coordinator.start("nowhere.invalid:1234", 2, {})


def test_an_unknown_service_is_left_to_jax(port, started):
    assert not coordinator.start(f"localhost:{port}", 2, {"an_option_of_another_jaxlib": 1})
