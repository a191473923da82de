"""Kernels lowered apart: found again, told apart, and the same for their callers. On a CPU, with functions in the place
of kernels.
"""

import hashlib
import json
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import quantize
from pallas_kernels.lowering import export_cache, manual_axes, trust
from pallas_kernels.lowering.export_cache import ExportCache
from pallas_kernels.quantized import Quantized

X = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def cache(tmp_path):
    cache = ExportCache(tmp_path / "kernels", platforms={"cpu": "cpu"})
    with export_cache.using(cache):
        yield cache
    cache.compilers.shutdown()


def kernel_of(traces):
    def kernel(x, q, factor):
        traces.append(factor)
        return {"product": x @ q.values * factor, "q": q, "none": None}

    return kernel


@pytest.mark.slow
def test_a_file_stands_for_the_same_operation_options_and_shapes_only(cache):
    traces = []
    kernel = kernel_of(traces)
    q = Quantized(jnp.ones((4, 2)), jnp.ones((1, 2)), "tile")

    def run(x, q, factor):
        jax.clear_caches()  # a new process
        return manual_axes.call(kernel, x, q, factor)

    for _ in range(2):
        result = run(X, q, 2)
        np.testing.assert_array_equal(result["product"], 2 * X @ q.values)
        assert result["none"] is None
        assert result["q"].grouping == "tile"
    assert traces == [2]
    run(X, q, 3)
    run(X[:2], q, 3)
    run(X, Quantized(q.values, q.scales, "block"), 3)
    assert traces == [2, 3, 3, 3]
    assert len(list(cache.folder.glob("kernel-*"))) == 4


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def foreign_bytes(whole: bytes, folder: Path) -> dict[str, bytes]:
    header, _, program = whole.partition(b"\n")
    described = json.loads(header)

    def signed(program):
        return json.dumps(described | {"sha256": hashlib.sha256(program).hexdigest()}).encode() + b"\n" + program

    other = jax.export.export(jax.jit(lambda xs: xs[0] + 1))([jax.ShapeDtypeStruct((2,), jnp.float32)])
    return {
        "half": whole[: len(whole) // 2],
        "nothing": b"",
        "a bit": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "pickle": pickle.dumps(Bomb(folder / "executed")),
        "pickle behind a good header": signed(pickle.dumps(Bomb(folder / "executed"))),
        "text": b"\n" * 1000,
        "deep JSON": b"[" * 100_000 + b"\n",
        "table of nothing": signed(bytes(64)),
        "another program": signed(bytes(other.serialize())),
        "another key": json.dumps(described | {"key": "kernel-other"}).encode() + b"\n" + program,
    }


@pytest.mark.slow
def test_foreign_bytes_are_refused_and_never_executed(cache, caplog, tmp_path):
    traces = []
    kernel, q = kernel_of(traces), Quantized(jnp.asarray(X.T), jnp.asarray(X), "tile")
    manual_axes.call(kernel, X, q, 2)
    (path,) = cache.folder.glob("kernel-*")
    whole = path.read_bytes()
    for number, (name, content) in enumerate(foreign_bytes(whole, tmp_path).items(), start=2):
        path.write_bytes(content)
        caplog.clear()
        jax.clear_caches()
        result = manual_axes.call(kernel, X, q, 2)
        assert "is not used, and made again" in caplog.text, name
        assert len(traces) == number, name
        np.testing.assert_array_equal(result["product"], 2 * X @ X.T)
        assert path.read_bytes() == whole, name
    assert not (tmp_path / "executed").exists()
    assert pickle.loads(pickle.dumps(Bomb(tmp_path / "executed"))) is None  # the bomb works
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "open"])
def test_what_is_not_a_file_of_this_user_is_refused(cache, caplog, tmp_path, kind):
    shapes = [jax.ShapeDtypeStruct((3,), jnp.float32)]
    path = cache.folder / "kernel-1"
    export_cache._lower(lambda xs: xs[0] * 2, "kernel", shapes, path, "cpu")
    assert export_cache._read(path, shapes, "cpu")
    whole = path.rename(tmp_path / "whole")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(whole)
    elif kind == "folder":
        path.mkdir()
    else:
        whole.rename(path).chmod(0o666)
    assert export_cache._read(path, shapes, "cpu") is None
    assert "is not used, and made again" in caplog.text


def test_a_folder_that_others_can_write_is_not_used(tmp_path, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    traces = []
    for folder in (shared, shared / "mine" / "kernels"):  # others may put another folder in the place of "mine"
        trust.make_private(folder)
        cache = ExportCache(folder, platforms={"cpu": "cpu"})
        with export_cache.using(cache):
            jax.clear_caches()
            manual_axes.call(kernel_of(traces), X, Quantized(X.T, X, "tile"), 2)
            manual_axes.call(kernel_of(traces), X, Quantized(X.T, X, "tile"), 3)
        assert not [path for path in folder.iterdir() if path.is_file()]
        assert caplog.text.count(f"Kernels are not kept in {folder}: {shared} can be written by all users") == 1
    assert traces == [2, 3] * 2


def test_others_are_told_from_this_user(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    trust.make_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert trust.fault_of(folder / "kernel-1") is None
    folder.parent.chmod(0o1777)  # as /tmp: only owners rename
    assert trust.fault_of(folder) is None
    folder.chmod(0o1777)
    assert "can be written by all users" in trust.fault_of(folder)
    folder.chmod(0o770)
    monkeypatch.setattr(trust, "_is_private", lambda group: group == folder.stat().st_gid)
    assert trust.fault_of(folder) is None
    monkeypatch.setattr(trust, "_is_private", lambda group: False)
    assert "can be written by group" in trust.fault_of(folder)
    folder.chmod(0o700)
    foreign = SimpleNamespace(st_uid=os.geteuid() + 1, st_gid=0, st_mode=0o700)
    assert "belongs to another user" in trust._fault(foreign, above=True)
    assert trust._fault(SimpleNamespace(st_uid=0, st_gid=0, st_mode=0o755), above=False) is None


def test_a_kernel_from_a_file_is_the_same_program(tmp_path):
    """Of a kernel for Hopper: the bytes of the program, and what its caller's becomes."""
    cache = ExportCache(tmp_path / "kernels", platforms={"cpu": "cuda"})
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    quantized = jax.jit(lambda x: quantize.quantize_tiles_both(x, implementation="hopper"))
    texts = []
    with export_cache.using(cache):
        for _ in range(2):
            jax.clear_caches()
            texts.append(quantized.trace(x).lower(lowering_platforms=("cuda",)).as_text())
            assert len(list(cache.folder.iterdir())) == 1
    assert "mosaic_gpu" in texts[0]
    assert texts[0] == texts[1]


def test_cold_times_stay_cold(cache):
    traces = []
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for _ in range(2):
            jax.clear_caches()
            manual_axes.call(kernel_of(traces), X, Quantized(X.T, X, "tile"), 2)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert traces == [2, 2]
    assert not cache.folder.exists()


def test_a_caller_on_a_mesh_sees_no_difference(cache):
    def run():
        def local(x):
            kernel = kernel_of([])
            product = jax.checkpoint(lambda x: manual_axes.call(kernel, x, Quantized(x.T, x, "tile"), 2)["product"])(x)
            return jax.lax.psum(product, "data")

        with jax.set_mesh(jax.make_mesh((2, 2), ("data", "expert"))):
            x = jax.device_put(np.arange(8, dtype=np.float32).reshape(4, 2), jax.P("data", None))
            return jax.jit(jax.shard_map(local, in_specs=jax.P("data"), out_specs=jax.P()))(x)

    apart = run()
    assert len(list(cache.folder.iterdir())) == 1
    with export_cache.using(None):
        np.testing.assert_array_equal(apart, run())


def test_kernels_are_compiled_meanwhile(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        export_cache,
        "_compile",
        lambda exported, shapes, compile=export_cache._compile: compiled.append(compile(exported, shapes)),
    )
    manual_axes.call(kernel_of([]), X, Quantized(X.T, X, "tile"), 2)
    cache.compilers.shutdown()  # waits
    assert len(compiled) == 1


def test_kernels_are_called_after_their_operations():
    lowered = jax.jit(lambda x: quantize.quantize_tiles(x, implementation="hopper")).trace(jnp.zeros((64, 128)))
    assert "quantize_tiles_mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()


def test_the_digest_of_sources_covers_the_package():
    """A kernel in a file is that of the text that made it."""
    assert Path(pallas_kernels.__file__).parent == export_cache.PACKAGE
