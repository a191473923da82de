"""Tensors arrive in order and in chunks, from a fixed number of buffers; what fails reaches the consumer, and nothing
stays open.
"""

import contextlib
import errno
import os
import threading

import numpy as np
import pytest

from deepseek_jax.safetensors import reader
from deepseek_jax.safetensors.folder import Shards
from tests.support.patience import SECONDS
from tests.support.shards import same, values, write


@pytest.fixture
def many(tmp_path):
    sizes = [(30, 10), (100,), (0, 4), (10, 100), (50,), (400, 10), (), (2, 5), (7, 100), (13, 23)] * 3
    shapes = {f"tensor{i:02d}": ("U8", shape) for i, shape in enumerate(sizes)}
    return Shards(write(tmp_path, shapes, 2500)), shapes


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("chunks")]


def open_files(shards):
    """Those of the folder that this process has open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if link.startswith(f"{shards.folder}/")]


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize(("chunk_bytes", "num_buffers"), [(1, 1), (130, 3), (10**6, 16)])
def test_chunks_come_in_order(many, monkeypatch, chunk_bytes, num_buffers, num_threads):
    shards, shapes = many
    made, aligned = [], reader.aligned
    monkeypatch.setattr(reader, "aligned", lambda size: made.append(size) or aligned(size))
    order = list(np.random.default_rng(0).permutation(list(shapes)))
    found = {}
    for chunk in shards.stream(order, chunk_bytes=chunk_bytes, num_buffers=num_buffers, num_threads=num_threads):
        rows = found.setdefault(chunk.name, [])
        assert chunk.first_row == sum(map(len, rows))
        assert chunk.values.ndim == 0 or chunk.values.nbytes <= max(chunk_bytes, chunk.values[:1].nbytes)
        assert chunk.values.ctypes.data % 64 == 0
        rows.append(chunk.values.copy()) if chunk.values.ndim else found.update({chunk.name: chunk.values.copy()})
        chunk.values[...] = 0
        chunk.release()
    assert list(found) == order
    for name, rows in found.items():
        same(np.concatenate(rows) if isinstance(rows, list) else rows, values(name, shapes))
    assert sum(size >= chunk_bytes for size in made) <= num_buffers + sum(size > chunk_bytes for size in made)
    assert not running()


def test_no_more_buffers_than_asked_for(many):
    """Chunks that are not released keep theirs: the next one comes when one is given back."""
    shards, shapes = many
    stream = shards.stream(list(shapes), chunk_bytes=100, num_buffers=3)
    kept, arrived = [next(stream) for _ in range(3)], threading.Event()
    assert len({chunk.values.ctypes.data for chunk in kept}) == 3
    waiting = threading.Thread(target=lambda: (kept.append(next(stream)), arrived.set()))
    waiting.start()
    assert not arrived.wait(0.05)
    kept[1].release()
    assert arrived.wait(SECONDS)
    waiting.join()
    assert kept[3].values.ctypes.data == kept[1].values.ctypes.data
    stream.close()


def test_a_large_tensor_is_read_by_all_threads(tmp_path, monkeypatch):
    shapes = {"large": ("U8", (4000,))}
    shards = Shards(write(tmp_path, shapes))
    barrier, preadv = threading.Barrier(4, timeout=SECONDS), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (barrier.wait(), preadv(*args))[1])
    found = [chunk.values for chunk in shards.stream(["large"], chunk_bytes=1000, num_threads=4)]
    same(np.concatenate(found), values("large", shapes))


def test_chunks_are_of_one_shape_where_that_is_cheap(many):
    shards, _ = many
    entry = shards.entries["tensor05"]  # 400 rows of 10 bytes
    for size, rows in {1: 1, 10: 1, 999: 80, 1000: 100, 1999: 100, 5000: 400}.items():
        assert reader.row_ranges(entry, size) == [range(first, first + rows) for first in range(0, 400, rows)]
    prime = shards.entries["tensor09"]  # 13 rows of 23
    assert reader.row_ranges(prime, 12 * 23) == [range(12), range(12, 13)]
    assert reader.row_ranges(prime, 13 * 23) == [range(13)]


def test_an_exception_reaches_the_consumer(many):
    shards, shapes = many
    entry = shards.entries["tensor05"]
    os.truncate(entry.file, entry.offset + 100)
    with pytest.raises(ValueError, match=f"{entry.file.name} ends within tensor05"):
        shards.read("tensor05")
    taken = []
    with pytest.raises(ValueError, match=f"{entry.file.name} ends within tensor05"):
        taken.extend(chunk.name for chunk in shards.stream(shapes))
    assert taken == list(shapes)[:5]
    assert not running()
    assert not open_files(shards)


def test_a_failing_disk_is_named(many, monkeypatch):
    shards, _ = many

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error while reading tensor03.*model-0000"):
        list(shards.stream(["tensor03"]))


def test_closing_ends_the_threads(many, monkeypatch):
    shards, shapes = many
    reads, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (reads.append(1), threading.Event().wait(0.001), preadv(*args))[2])
    iterator = shards.stream(shapes, chunk_bytes=16)
    next(iterator)
    assert running()
    assert open_files(shards)
    iterator.close()
    assert not running()
    assert len(reads) < 40
    assert not open_files(shards)


@pytest.mark.parametrize("option", ["chunk_bytes", "num_buffers", "num_threads"])
def test_options_are_positive(many, option):
    with pytest.raises(ValueError, match=rf"{option} \(0\)"):
        many[0].stream([], **{option: 0})
