"""The watchdog's bound, on a clock of the test's."""

import subprocess
import sys

from deepseek_jax.parallel.watchdog import FLOOR_SECONDS, MEASURED_STEPS, MULTIPLE, STUCK, Watchdog


class Clock:
    """Seconds that the test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measured(seconds: float) -> tuple[Watchdog, Clock, int]:
    """Return a watchdog that knows steps of `seconds`, its clock and the last step."""
    clock = Clock()
    watchdog = Watchdog(enabled=False, clock=clock)
    watchdog.finished(0)
    for step in range(1, MEASURED_STEPS + 1):
        assert pass_time(watchdog, clock, seconds) is None
        watchdog.finished(step)
    return watchdog, clock, MEASURED_STEPS


def pass_time(watchdog: Watchdog, clock: Clock, seconds: float) -> str | None:
    """Look once a second; return the first line."""
    for _ in range(int(seconds)):
        clock.now += 1.0
        if (why := watchdog.look()) is not None:
            return why
    return None


def test_a_loop_that_stands_still_is_named_after_the_floor():
    watchdog, clock, step = measured(1.0)
    assert pass_time(watchdog, clock, FLOOR_SECONDS) is None
    why = pass_time(watchdog, clock, 2)
    assert f"after step {step} " in why
    assert "phase: step" in why


def test_long_steps_have_a_longer_bound():
    watchdog, clock, _ = measured(100.0)
    assert pass_time(watchdog, clock, MULTIPLE * 100 - 1) is None
    assert pass_time(watchdog, clock, 3) is not None


def test_first_steps_are_exempt():
    clock = Clock()
    watchdog = Watchdog(enabled=False, clock=clock)
    for step in range(MEASURED_STEPS):
        watchdog.finished(step)
    assert pass_time(watchdog, clock, 10 * FLOOR_SECONDS) is None


def test_a_phase_is_exempt_until_the_next_finished_step():
    """Others may be in it for longer, and this process waits for them in its next step."""
    watchdog, clock, step = measured(1.0)
    with watchdog.phase("compiling"):
        assert pass_time(watchdog, clock, 2 * FLOOR_SECONDS) is None
    assert pass_time(watchdog, clock, 2 * FLOOR_SECONDS) is None
    watchdog.finished(step + 1)
    assert "median step 1 s" in pass_time(watchdog, clock, FLOOR_SECONDS + 2)  # the phase was not measured


def test_a_process_that_was_stopped_gets_the_time_again():
    watchdog, clock, _ = measured(1.0)
    watchdog.look()
    clock.now += 10 * FLOOR_SECONDS
    assert watchdog.look() is None
    assert pass_time(watchdog, clock, FLOOR_SECONDS + 2) is not None


def test_a_sleeping_process_ends_with_its_stacks():
    program = """
import time
from deepseek_jax.parallel import watch
from deepseek_jax.parallel.watchdog import Watchdog
watch.GRACE_SECONDS = 500.0  # of a machine on which the stacks may take long
def asleep(watchdog):
    for step in range(5):
        watchdog.finished(step)
    time.sleep(600)
with Watchdog(enabled=True, floor_seconds=0.5) as watchdog:
    asleep(watchdog)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500)
    assert ended.returncode == STUCK
    assert "process 0: no step was finished" in ended.stderr
    assert "in asleep" in ended.stderr
