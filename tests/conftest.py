"""Every test runs on a simulated mesh of eight CPU devices, with a compilation cache that outlives the run."""

import gc
import os
from pathlib import Path

import hypothesis
import pytest

from tests.support import compiling

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = compiling.flags_with(os.environ.get("XLA_FLAGS", ""))

import jax

from experiments import program_cache

CACHE = Path(__file__).parents[1] / ".cache" / "jax-tests"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
program_cache.write_whole()  # the workers share the folder
compiling.remove_left_over(CACHE)

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


def pytest_unconfigure() -> None:
    """End fast: pytest collects garbage five times, and execnet sends SIGINT to a worker that takes five seconds."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the xdist group of a test into its node id.

    xdist 3.8 writes it to `_nodeid`, which pytest 9.2 does not read: a group's tests would run in any worker, and
    compile in both what its comment says is compiled once. `tests/test_house.py` shows that groups hold.
    """
    if not hasattr(config, "workerinput"):  # no worker of xdist
        return
    for item in items:
        names = sorted({mark.args[0] for mark in item.iter_markers("xdist_group")})
        suffix = f"@{'_'.join(names)}"
        if names and not item.nodeid.endswith(suffix):
            item._id = type(item.id).parse(item.nodeid + suffix)
