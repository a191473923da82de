"""A program of several processes with the smallest loop: `python -m tests.training.peers <port> <count> <index>`.

Each step is one sum over all processes, so nobody is ahead. It ends like a training: by a signal, after the same step.
"""

import signal
import sys
import time

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import processes, watch
from deepseek_jax.parallel.watchdog import Watchdog
from deepseek_jax.training.interruption import Abort, Interruption

MOST_STEPS = 10_000


def main(port: int, count: int, index: int, fail_at: int = -1, asleep_at: int = -1, bound: int = 300) -> None:
    """Add up ones until a signal comes; print the step and exit with 128 + the signal.

    Process 1 may fail at a step, or fall asleep there; no step may take longer than `bound` seconds.
    """
    jax.config.update("jax_platforms", "cpu")
    with Abort("nothing was lost"):
        processes.join(f"localhost:{port}", count, index, processes.CONNECT_SECONDS)
        mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        ones = jax.device_put(jnp.ones(count), jax.NamedSharding(mesh, jax.P("data")))
        add = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
        step, number = 0, signal.SIGKILL
        watchdog = Watchdog(floor_seconds=bound)
        with watch.lost_processes_named(), Interruption() as interruption, watchdog:
            while step < MOST_STEPS and not interruption.requested(step):
                assert float(add(ones)) == count
                step += 1
                watchdog.finished(step)
                if step == asleep_at and index == 1:
                    fall_asleep()
                if step == fail_at and index == 1:
                    raise ValueError("process 1 has a problem")
                if step == 10:
                    print("at step 10", flush=True)
                time.sleep(0.01)
            number = interruption.signal
        print(f"stopped after step {step}", flush=True)
        sys.exit(128 + number)


def fall_asleep() -> None:
    """Sleep for as long as a test may take, as a file system or a library that hangs does."""
    time.sleep(600)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
