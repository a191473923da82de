"""What every command does first: where JAX will compute, and what malloc does with a step's temporaries."""

import platform
import subprocess
import sys
import textwrap

import jax
import pytest

from experiments import accelerator, session

COUNT_FAULTS = """
    import ctypes, resource, sys
    from experiments import session

    if "keep" in sys.argv:
        assert session.keep_freed_memory(64 << 20)
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def touch():
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(40 << 20)))
        ctypes.memset(block, 1, 40 << 20)
        libc.free(block)

    touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        touch()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    """Page faults of touching 40 MiB four times over, after the first."""
    command = [sys.executable, "-c", textwrap.dedent(COUNT_FAULTS), *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory as it likes")
def test_freed_memory_is_used_again():
    assert faults("keep") < 100
    assert faults() > 4 * 10  # four blocks mapped anew: 10,240 faults each on pages of 4 KiB, 20 on huge ones


def test_platform_is_read_from_the_configuration():
    assert jax.config.jax_platforms == "cpu" and session.computes_on_cpu()
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        assert not session.computes_on_cpu()
    finally:
        jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize(
    ("files", "plugins", "variables", "chosen"),
    [
        ([], ["jax_cuda13_plugin", "libtpu"], {}, "cpu"),  # the extra `dev` alone
        (["nvidia0"], ["jax_cuda13_plugin", "libtpu"], {}, "cuda,cpu"),
        (["nvidia0"], ["libtpu"], {}, None),
        (["nvidia0"], ["jax_cuda13_plugin"], {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (["nvidiactl"], ["jax_cuda13_plugin"], {}, "cpu"),
        (["accel3"], ["libtpu"], {}, "tpu,cpu"),
        (["nvidia0"], ["jax_cuda13_plugin"], {"JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_commands_compute_on_the_device_that_is_there(monkeypatch, tmp_path, files, plugins, variables, chosen):
    for name in files:
        (tmp_path / name).touch()
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(accelerator.find, "__defaults__", (tmp_path,))
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: name in plugins or None)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        accelerator.choose()
        assert jax.config.jax_platforms == chosen
    finally:
        jax.config.update("jax_platforms", before)
