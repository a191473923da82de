"""Compiling for TPUs that this machine does not have, in a process of its own: libtpu reads its environment once."""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from deepseek_jax.plan import chips
from tests.support import compiling

ROOT = Path(__file__).parents[2]
ENVIRONMENT = chips.ENVIRONMENT | {"XLA_FLAGS": compiling.ACCELERATOR_FLAGS}


def compile_elsewhere(file: str, *arguments: str) -> str:
    """Run the test file `file` as a program, which compiles; return its output. Skip where there is no libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: the `dev` extra has it on Linux x86-64")
    command = [sys.executable, "-m", ".".join(Path(file).relative_to(ROOT).with_suffix("").parts), *arguments]
    options = {"cwd": ROOT, "env": os.environ | ENVIRONMENT, "capture_output": True, "text": True}
    run = subprocess.run(command, check=False, timeout=1100, **options)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def structs_on(topology: str) -> Callable:
    """Return `ShapeDtypeStruct` with the sharding of one device of `topology`."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    return functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
