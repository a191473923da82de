"""How programs of tests are compiled, in this process and in those that tests start: quickly.

Compiling is what the tests spend their time on. Without LLVM's optimisation, and with XLA's older emitters of fusions,
it takes some 40% of the CPU seconds of XLA's defaults, for a small operation (12 of 35 ms) as for a whole model (2.0 of
5.0 s), and keeps the arithmetic in FP32. Steps take about twice as long, which counts only where a test trains for
hundreds. A compiler for an accelerator gets what it had before: `ACCELERATOR_FLAGS`.
"""

import contextlib
import time
from pathlib import Path

OPTIONS = {"xla_backend_optimization_level": "0", "xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters"}
FLAGS = " ".join(f"--{name}={value}" for name, value in OPTIONS.items())
RUN_OFTEN = {"xla_backend_optimization_level": "1"}  # `compiler_options` of a program that runs longer than it compiles
ACCELERATOR_FLAGS = "--xla_backend_optimization_level=1"
# Simulated devices of a loaded machine wait long for each other: XLA ends the process after 40 s, here after 300.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=300"

LEFT_OVER = 3600.0  # seconds after which nobody writes a file any more


def remove_left_over(folder: Path) -> None:
    """Remove what killed processes left of the entries that they wrote (`experiments/program_cache.py`)."""
    for partial in folder.glob("partial-*"):
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            if time.time() - partial.stat().st_mtime > LEFT_OVER:
                partial.unlink()


def flags_with(own: str) -> str:
    """Return XLA_FLAGS of the tests; `own` are those of whoever runs them, and XLA takes what is said last."""
    return f"{FLAGS} {PATIENCE} {own}".rstrip()
