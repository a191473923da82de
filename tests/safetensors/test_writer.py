"""A killed conversion goes on with the same bytes; whatever would spoil a folder is refused."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.safetensors import writer as writer_module
from deepseek_jax.safetensors.folder import INDEX, Shards
from deepseek_jax.safetensors.record import check_target, verify
from deepseek_jax.safetensors.writer import Planned, ShardWriter, plan
from tests.support.patience import SECONDS
from tests.support.shards import FILES, SHAPES, SIZE, hashes, planned, same, values, write


def test_continuing_keeps_finished_shards(tmp_path):
    whole, folder = write(tmp_path / "whole"), tmp_path / "new"
    writer, seen = ShardWriter(folder, planned(), SIZE), []

    def get(name):
        if name == "f":
            raise KeyboardInterrupt
        return values(name)

    with pytest.raises(KeyboardInterrupt):
        writer.write(get, seen.append)
    assert writer.missing() == FILES[2:]
    assert sorted(hashes(folder)) == sorted([*FILES[:2], "conversion.json"])
    with pytest.raises(ValueError, match="has 2 shards.*unfinished"):
        Shards(folder)
    with pytest.raises(ValueError, match="2 of 3 shards"):
        verify(folder)
    before = {file: ((folder / file).stat().st_ino, (folder / file).stat().st_mtime_ns) for file in FILES[:2]}
    (folder / f"{FILES[2]}.partial-host-1-1").write_bytes(b"left over")
    asked, seen = [], []
    writer = ShardWriter(folder, planned(), SIZE)
    writer.write(lambda name: (asked.append(name), values(name))[1], seen.append)
    assert asked == ["d", "e", "f"]
    assert sum(seen) == (folder / FILES[2]).stat().st_size == writer.num_bytes(FILES[2])
    assert before == {file: ((folder / file).stat().st_ino, (folder / file).stat().st_mtime_ns) for file in FILES[:2]}
    assert hashes(folder) == hashes(whole)
    asked.clear()
    writer.write(lambda name: asked.append(name))
    assert not asked
    assert not writer.missing()


def test_shards_side_by_side(tmp_path):
    """As many as asked for, each in its order; the same bytes as one after the other."""
    shapes = {f"{shard}{i}": ("U8", (size,)) for shard in "abcdefg" for i, size in enumerate([60, 5, 65])}
    asked, barrier, seen = [], threading.Barrier(3, timeout=SECONDS), []

    def get(name):
        asked.append(name)
        if name[0] in "abc" and name[1] == "1":
            barrier.wait()  # these three are written at the same time
        return values(name, shapes)

    writer = ShardWriter(tmp_path / "new", planned(shapes), SIZE)
    writer.write(get, seen.append, shards_at_once=3)
    assert sorted(asked) == sorted(shapes)
    assert all([name for name in asked if name[0] == shard] == [f"{shard}{i}" for i in range(3)] for shard in "abcdefg")
    assert sum(seen) == sum(map(writer.num_bytes, writer.shards))
    assert hashes(tmp_path / "new") == hashes(write(tmp_path / "old", shapes))


def test_the_first_failure_ends_the_other_shards(tmp_path, monkeypatch):
    """It is the one that is raised, and those beside it stop at their next chunk."""
    monkeypatch.setattr(writer_module, "_CHUNK_BYTES", 10)
    shapes = dict.fromkeys("abcd", ("U8", (SIZE,)))
    both, asked, made = threading.Barrier(2, timeout=SECONDS), [], []

    class Event(threading.Event):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(writer_module, "threading", SimpleNamespace(Lock=threading.Lock, Event=Event))

    def get(name):
        asked.append(name)
        both.wait()
        if name == "b":
            raise KeyError(name)
        assert made[0].wait(SECONDS)  # that it has failed
        return values(name, shapes)

    with pytest.raises(KeyError, match="b"):
        ShardWriter(tmp_path, planned(shapes), SIZE).write(get, shards_at_once=2)
    assert sorted(asked) == ["a", "b"]
    assert [file.name for file in tmp_path.iterdir()] == ["conversion.json"]


KILLED = """
import os, shutil, signal, sys
from tests.support.patience import SECONDS
from tests.support.shards import FILES, hashes, write
folder = sys.argv[1] + "/new"
whole = hashes(write(sys.argv[1] + "/whole"))
names = ["write", "fsync", "replace", "unlink"]
real = {name: getattr(os, name) for name in names}
def child(call, n):
    pid = os.fork()
    if pid == 0:
        left = n
        def counted(name):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                # A killed process loses nothing that the kernel has, so fsync only counts here.
                return None if name == "fsync" else real[name](*args, **kwargs)
            return run
        for name in names:
            setattr(os, name, counted(name))
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
n = 0
while True:
    shutil.rmtree(folder, ignore_errors=True)
    code = child(lambda: write(folder), n)
    finished = {file: os.stat(f"{folder}/{file}").st_ino for file in FILES[:1] if os.path.exists(f"{folder}/{file}")}
    recorded = finished and FILES[0] in open(f"{folder}/conversion.json").read()
    assert child(lambda: write(folder), 10**9) == 0
    assert hashes(folder) == whole, n
    if recorded:
        assert finished[FILES[0]] == os.stat(f"{folder}/{FILES[0]}").st_ino, n
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    n += 1
print(n)
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    """SIGKILL before each write, fsync and rename in turn; then the same command again."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # moments


def test_a_full_disk(tmp_path, monkeypatch):
    whole, folder = write(tmp_path / "whole"), tmp_path / "new"
    writer, real = ShardWriter(folder, planned(), SIZE), os.write
    room = writer.num_bytes(FILES[1]) - 100  # for all of the header and 28 of 128 bytes

    def limited(descriptor, data):
        nonlocal room
        if f"{FILES[1]}.partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            data = data[: min(room, 70)]
            room -= len(data)
            if not data:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        with pytest.raises(OSError, match=rf"full at c: .* needs 128 bytes, \d+ are free.*{FILES[1]}") as caught:
            writer.write(values)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(hashes(folder)) == sorted([FILES[0], "conversion.json"])
    writer.write(values)
    assert hashes(folder) == hashes(whole)


def test_too_little_room_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, planned(), SIZE)
    needed = sum(writer.num_bytes(file) for file in FILES)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=f"missing shards need {needed} bytes and {needed - 1} are free"):
        writer.write(lambda name: pytest.fail("asked for a tensor"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    writer.write(values)


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": SHAPES | {"a": ("F32", (5, 3))}},
        {"max_shard_bytes": 200},
        {"source": "step 2"},
    ],
    ids=["shape", "size", "source"],
)
def test_another_plan_does_not_continue_a_folder(tmp_path, change):
    before = hashes(write(tmp_path, source="step 1"))
    with pytest.raises(ValueError, match="other tensors, shard sizes or source: choose another folder, or delete"):
        write(tmp_path, **({"source": "step 1"} | change))
    assert hashes(tmp_path) == before


def test_another_precision_is_named(tmp_path):
    write(tmp_path)
    shapes = {name: ("BF16", shape) for name, (_, shape) in SHAPES.items()}
    with pytest.raises(ValueError, match=r"precision \(.*F32.*\) than this one \(BF16\): give that --precision"):
        check_target(tmp_path, 0, (dtype for dtype, _ in shapes.values()))
    with pytest.raises(ValueError, match="another precision"):
        write(tmp_path, shapes=shapes)


@pytest.mark.parametrize(
    "wrong", [lambda a: a.T, lambda a: a.astype(np.float64), lambda a: a.astype(">f4"), lambda a: a.reshape(-1)]
)
def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"a is .*, planned is float32 \[3, 5\]"):
        ShardWriter(tmp_path, planned(), SIZE).write(lambda name: wrong(values(name)))
    assert sorted(hashes(tmp_path)) == ["conversion.json"]


@pytest.mark.parametrize(
    "array", [np.arange(15, dtype=np.float32).reshape(5, 3).T, np.arange(15, dtype=np.float32)[::2]]
)
def test_a_view_is_written_in_its_own_order(tmp_path, array):
    ShardWriter(tmp_path, [Planned("a", "F32", array.shape)]).write(lambda name: array)
    same(Shards(tmp_path).read("a"), array)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(partial, path):
        calls.append(("rename", Path(path)))
        assert calls[-2] == ("sync", Path(partial))
        replace(partial, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write(tmp_path)
    record = "conversion.json"
    order = [record, FILES[0], record, FILES[1], record, FILES[2], record, INDEX]
    assert [path.name for call, path in calls if call == "rename"] == order
    assert calls.count(("sync", tmp_path)) == len(order)


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="a is planned twice"):
        plan([Planned("a", "F32", (1,)), Planned("a", "F32", (1,))], 100)
    with pytest.raises(ValueError, match="0 tensors"):
        plan([], 100)
    with pytest.raises(ValueError, match="a has the unknown dtype 'float32'"):
        Planned("a", "float32", (1,))
    with pytest.raises(ValueError, match="cannot be called '__metadata__'"):
        Planned("__metadata__", "F32", (1,))


def test_a_large_tensor_goes_through_in_chunks(tmp_path, monkeypatch):
    shapes = {"large": ("BF16", (1 << 20, 5))}
    monkeypatch.setattr(writer_module, "_CHUNK_BYTES", 1 << 20)
    seen = []
    ShardWriter(tmp_path, planned(shapes)).write(lambda name: values(name, shapes), seen.append)
    assert max(seen) == 1 << 20
    same(Shards(tmp_path).read("large"), values("large", shapes))
    verify(tmp_path)
