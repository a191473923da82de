"""Waiting for what another thread or process does, on a machine that may be busy with others for long."""

import time
from collections.abc import Callable

SECONDS = 120.0  # after which a test says that it does not happen


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Return when `condition` holds; fail if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.005)
