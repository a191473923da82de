"""Compiling for TPUs that this machine does not have, in a process of its own: libtpu reads its environment once."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.plan import chips
from tests.support import compiling

ROOT = Path(__file__).parents[2]
ENVIRONMENT = chips.ENVIRONMENT | {"XLA_FLAGS": compiling.ACCELERATOR_FLAGS}


def compile_elsewhere(file: str, topology: str) -> None:
    """Run the test file `file` as a program, which compiles for `topology`; skip the test where there is no libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: the `dev` extra has it on Linux x86-64")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, file, topology]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1100)
    assert run.returncode == 0, run.stderr[-4000:]
