"""A program of several processes with the smallest loop: `python -m tests.training.peers --happens=asleep`.

Each step is one sum over all processes, so nobody is ahead. It starts and ends like a training: through the front door
of the commands, by a signal after the same step. At step `EVENT_STEP` something may happen to the last process.
"""

import concurrent.futures
import errno
import os
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from deepseek_jax.parallel import watch
from deepseek_jax.parallel.watchdog import Watchdog
from deepseek_jax.training.interruption import Abort, Interruption
from experiments import command, session

EVENT_STEP = 40
MOST_STEPS = 10_000
MORE_THAN_THERE_IS = 1 << 50  # bytes


def fall_asleep() -> None:
    """Sleep for as long as a test may take, as a file system or a library that hangs does."""
    time.sleep(600)


def fail() -> None:
    """Raise in the loop what a fault of the input raises."""
    raise ValueError("one process has a problem")


def read_a_broken_disk() -> None:
    """Raise what a disk does, in a thread that reads ahead."""

    def read():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/corpus/part-7.zst")

    with concurrent.futures.ThreadPoolExecutor(1) as readers:
        readers.submit(read).result()


def run_out_of_memory() -> None:
    """Let XLA fail to allocate in a step."""
    jax.jit(lambda: jnp.zeros(MORE_THAN_THERE_IS, jnp.uint8))().block_until_ready()


EVENTS: dict[str, Callable[[], None]] = {
    "asleep": fall_asleep,
    "error": fail,
    "broken disk": read_a_broken_disk,
    "out of memory": run_out_of_memory,
}
COMPILES_LONGER = "compiles longer"

HAPPENS = flags.DEFINE_enum("happens", None, [*EVENTS, COMPILES_LONGER], "To the last process.")
BOUND = flags.DEFINE_float("bound", 300.0, "Seconds that no step may exceed.")


def main(_) -> None:
    """Add up ones until a signal comes; print the step and exit with 128 + the signal."""
    with Abort("nothing was lost"):
        session.start(keep_heap=False)
        count, index = jax.process_count(), jax.process_index()
        mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        ones = jax.device_put(jnp.ones(count), jax.NamedSharding(mesh, jax.P("data")))
        add = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
        step, watchdog = 0, Watchdog(floor_seconds=BOUND.value)
        with watch.lost_processes_named(), Interruption() as interruption, watchdog:
            while step < MOST_STEPS and not interruption.requested(step):
                assert float(add(ones)) == count
                step += 1
                watchdog.finished(step)
                if step in (10, 2 * EVENT_STEP):
                    print(f"at step {step}", flush=True)
                if step == EVENT_STEP:
                    happen(index == count - 1, watchdog)
                time.sleep(0.01)
            number = interruption.signal
        print(f"stopped after step {step}", flush=True)
        sys.exit(128 + number)


def happen(here: bool, watchdog: Watchdog) -> None:
    """Let happen what the flag says; all processes compile, and this one for longer if it is `here`."""
    if HAPPENS.value == COMPILES_LONGER:
        with watchdog.phase("compiling"):
            time.sleep(3 * BOUND.value if here else 0.0)
    elif here and HAPPENS.value is not None:
        print("now", flush=True)
        EVENTS[HAPPENS.value]()


if __name__ == "__main__":
    command.run(main)
