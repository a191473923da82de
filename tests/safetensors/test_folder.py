"""What is written is read, by us and by the safetensors library; what is damaged is refused; a killed conversion goes
on.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.safetensors import folder as folder_module
from deepseek_jax.safetensors import writer as writer_module
from deepseek_jax.safetensors.folder import INDEX, Shards, compare
from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.safetensors.writer import Planned, ShardWriter, check_target, file_name, plan, verify

SIZE = 130  # bytes; tensors a and b, c, and d to f fill a shard each
FILES = [file_name(i, 3) for i in (1, 2, 3)]
SHAPES = {
    "a": ("F32", (3, 5)),
    "b": ("BF16", (7,)),
    "c": ("F8_E4M3", (64, 2)),
    "d": ("I32", ()),
    "e": ("F32", (0, 4)),
    "f": ("F32", (31,)),
}


def planned(shapes=SHAPES):
    return [Planned(name, dtype, shape) for name, (dtype, shape) in shapes.items()]


def values(name, shapes=SHAPES):
    """Bytes that depend on the name; every bit pattern is a value."""
    dtype, shape = shapes[name]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, num_bytes, np.uint8)
    return data.view(DTYPES[dtype]).reshape(shape)


def write(folder, shapes=SHAPES, max_shard_bytes=SIZE, **settings):
    ShardWriter(folder, planned(shapes), max_shard_bytes, **settings).write(lambda name: values(name, shapes))
    return folder


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def same(array, expected):
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()


def raw(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tensor(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# Reading and writing


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES)), shapes), min_size=1, max_size=8),
    st.integers(1, 300),
)
def test_what_is_written_is_read(expected, max_shard_bytes):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, expected, max_shard_bytes)
        shards = Shards(folder)
        assert {name: (entry.dtype, entry.shape) for name, entry in shards.entries.items()} == expected
        assert list(shards.entries) == list(expected)
        for name in expected:
            same(shards.read(name), values(name, expected))
        compare(shards, expected)
        verify(folder)
        lengths = [int.from_bytes(file.read_bytes()[:8], "little") for file in Path(folder).glob("*.safetensors")]
        assert not any(length % 8 for length in lengths)
        theirs = [
            item
            for file in sorted(Path(folder).glob("*.safetensors"))
            for item in safetensors.deserialize(file.read_bytes())
        ]
        found = {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in theirs}
        assert found == {
            name: (dtype, shape, values(name, expected).tobytes()) for name, (dtype, shape) in expected.items()
        }


def test_the_library_loads_our_files(tmp_path):
    shapes = {name: value for name, value in SHAPES.items() if value[0] in ("F32", "I32")}
    folder = write(tmp_path / "new", shapes, 10**6)
    file = folder / "model-00001-of-000001.safetensors"
    loaded = safetensors.numpy.load_file(file)
    assert set(loaded) == set(shapes)
    for name, array in loaded.items():
        same(array, values(name, shapes))
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"} == Shards(folder).metadata


def test_we_read_the_librarys_files(tmp_path):
    arrays = {name: values(name) for name in SHAPES if SHAPES[name][0] in ("F32", "I32")}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"made": "by it"})
    shards = Shards(tmp_path)
    assert shards.metadata == {"made": "by it"}
    assert shards.num_bytes == sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        same(shards.read(name), array)


def test_names_and_index_are_those_of_a_released_checkpoint(tmp_path):
    folder = write(tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == sorted([*FILES, INDEX, "conversion.json"])
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(values(name).nbytes for name in SHAPES) == Shards(folder).num_bytes
    where = {file: [name for name, its in index["weight_map"].items() if its == file] for file in FILES}
    assert where == {FILES[0]: ["a", "b"], FILES[1]: ["c"], FILES[2]: ["d", "e", "f"]}
    assert file_name(1, 163) == "model-00001-of-000163.safetensors"


def test_a_shard_is_full_before_the_next_begins():
    sizes = [4, 6, 1, 30, 10, 0]
    tensors = [Planned(str(i), "U8", (size,)) for i, size in enumerate(sizes)]
    assert [[tensor.num_bytes for tensor in shard] for shard in plan(tensors, 10)] == [[4, 6], [1], [30], [10, 0]]


def test_arrays_are_aligned_and_own_their_memory(tmp_path):
    shards = Shards(write(tmp_path))
    array = shards.read("a")
    assert array.ctypes.data % 64 == 0
    array[:] = 0
    same(shards.read("a"), values("a"))


def test_short_reads_are_continued(tmp_path, monkeypatch):
    shards, preadv = Shards(write(tmp_path)), os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, buffers, offset: preadv(number, [buffers[0][:77]], offset))
    same(shards.read("c"), values("c"))


@pytest.mark.parametrize(
    "call", [lambda s: s.read("no"), lambda s: s.stream(["a", "no"]), lambda s: s.equal("a", "no")]
)
def test_unknown_names_are_refused_at_once(tmp_path, call):
    with pytest.raises(ValueError, match="has no tensor no"):
        call(Shards(write(tmp_path)))


@pytest.mark.parametrize("changed", [None, 0, 45_000, 89_999])
def test_equal_tells_one_wrong_byte(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(folder_module.reader, "PIECE_BYTES", 4096)
    data = np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)
    other = data.copy()
    if changed is not None:
        other.flat[changed] ^= 1
    arrays = {"a": data, "b": other, "c": data.view(np.int8), "d": data.reshape(900, 100)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    assert shards.equal("a", "b") == (changed is None)
    assert not shards.equal("a", "c")
    assert not shards.equal("a", "d")


# What is refused


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*absent"):
        Shards(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        Shards(tmp_path)


WRONG_HEADERS = {
    "length": ({"header": {}, "length": 100}, "truncated or no safetensors"),
    "huge": ({"header": {}, "length": 100_000_001}, "would have 100000001 bytes"),
    "json": ({"header": b"{nothing"}, "cannot be understood"),
    "utf8": ({"header": b'{"\xff": 1}'}, "cannot be understood"),
    "list": ({"header": []}, "cannot be understood"),
    "twice": ({"header": b'{"t": {}, "t": {}}'}, "t stands in it twice"),
    "metadata": ({"header": {"__metadata__": {"a": 1}}}, "more than strings"),
    "fields": ({"header": {"t": {"dtype": "U8", "shape": [1]}}, "data": b"1"}, "does not describe t .*data_offsets"),
    "no fields": ({"header": {"t": 1}}, "does not describe t"),
    "negative": ({"header": {"t": tensor(0, 4, shape=[-4])}, "data": b"1234"}, "does not describe t .*integers"),
    "float": ({"header": {"t": tensor(0, 4, shape=[4.0])}, "data": b"1234"}, "does not describe t .*integers"),
    "dtype": ({"header": {"t": tensor(0, 4, "F4")}, "data": b"1234"}, "t has the unknown dtype 'F4'"),
    "size": ({"header": {"t": tensor(0, 4, "F32", [2])}, "data": b"1234"}, r"t is F32 \[2\], 8 bytes, but has 4"),
    "gap": ({"header": {"t": tensor(0, 4), "u": tensor(5, 8)}, "data": b"12345678"}, "u leaves a gap"),
    "first gap": ({"header": {"t": tensor(1, 4)}, "data": b"1234"}, "t leaves a gap"),
    "overlap": ({"header": {"t": tensor(0, 4), "u": tensor(3, 8)}, "data": b"12345678"}, "u overlaps"),
    "short": (
        {"header": {"u": tensor(4, 8), "t": tensor(0, 4), "v": tensor(8, 9)}, "data": b"12345"},
        "truncated: .*, and u ends at",
    ),
    "long": ({"header": {"t": tensor(0, 4)}, "data": b"12345"}, r"its last tensor \(t\) ends at"),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_wrong_files_are_refused(tmp_path, case):
    made, message = WRONG_HEADERS[case]
    raw(tmp_path / "model.safetensors", **made)
    with pytest.raises(ValueError, match=rf"(?s)model\.safetensors.*{message}|{message}.*model\.safetensors") as caught:
        Shards(tmp_path)
    assert "again" in str(caught.value) or "convert it" in str(caught.value)  # the remedy


@pytest.mark.parametrize("size", [0, 5, 8, 20, -1])
def test_every_truncation_is_seen(tmp_path, size):
    file = write(tmp_path) / FILES[1]
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    with pytest.raises(ValueError, match=FILES[1]):
        Shards(tmp_path)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


WRONG_FOLDERS = {
    "absent file": (lambda f: (f / FILES[1]).unlink(), f"says that c is in {FILES[1]}, which is absent"),
    "outside": (lambda f: edit_index(f, lambda m: m.update(c=f"../{FILES[1]}")), "which is absent"),
    "absent tensor": (
        lambda f: edit_index(f, lambda m: m.update(z=FILES[0])),
        f"says that z is in {FILES[0]}, which lacks it .no file",
    ),
    "other file": (
        lambda f: edit_index(f, lambda m: m.update(a=FILES[1])),
        f"a is in {FILES[1]}, which lacks it .it is in {FILES[0]}",
    ),
    "extra tensor": (lambda f: edit_index(f, lambda m: m.pop("b")), f"{FILES[0]} holds b, which .*does not name"),
    "extra file": (
        lambda f: raw(f / "z.safetensors", {"t": tensor(0, 1)}, b"1"),
        r"does not name z\.safetensors, which holds t",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), "has 3 shards.*unfinished"),
    "fewer": (
        lambda f: (edit_index(f, lambda m: m.pop("c")), (f / FILES[1]).unlink()),
        "lacks 1 of 3 shards .number 2",
    ),
    "json": (lambda f: (f / INDEX).write_text("{"), "is no index"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "is no index.*weight_map"),
    "numbers": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "is no index"),
    "list": (lambda f: (f / INDEX).write_text("[]"), "is no index"),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_wrong_folders_are_refused(tmp_path, case):
    spoil, message = WRONG_FOLDERS[case]
    spoil(write(tmp_path))
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path)


def test_the_same_tensor_in_two_files(tmp_path):
    for file in ("one", "two"):
        raw(tmp_path / f"{file}.safetensors", {"t": tensor(0, 1)}, b"1")
    with pytest.raises(ValueError, match=r"tensor t is in .*one\.safetensors and in .*two\.safetensors"):
        Shards(tmp_path)


def test_compare_lists_all_findings(tmp_path):
    shards = Shards(write(tmp_path))
    missing = {f"m{i}": ("F32", (1,)) for i in range(9)}
    expected = SHAPES | missing | {"a": ("F32", (5, 3)), "b": ("F16", (7,))}
    del expected["f"]
    with pytest.raises(ValueError) as caught:
        compare(shards, expected)
    text = str(caught.value)
    assert "9 missing: m0, m1, m2, m3, m4 and 4 more" in text
    assert f"1 of another shape: a in {FILES[0]} has [3, 5], should have [5, 3]" in text
    assert f"1 of another dtype: b in {FILES[0]} has BF16, should have F16" in text
    assert f"1 extra: f in {FILES[2]}" in text
    with pytest.raises(ValueError, match="another shape") as caught:
        compare(shards, expected, frozenset([*missing, "f", "a"]))
    assert "missing" not in str(caught.value)
    assert "extra" not in str(caught.value)


# Interrupted, continued


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
    (folder / f"{FILES[2]}.partial-1").write_bytes(b"left over")
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
    asked, barrier, seen = [], threading.Barrier(3, timeout=5), []

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
    both, failed, asked = threading.Barrier(2, timeout=5), threading.Event(), []

    def get(name):
        asked.append(name)
        both.wait()
        if name == "b":
            failed.set()
            raise KeyError(name)
        assert failed.wait(5)
        time.sleep(0.05)
        return values(name, shapes)

    with pytest.raises(KeyError, match="b"):
        ShardWriter(tmp_path, planned(shapes), SIZE).write(get, shards_at_once=2)
    assert sorted(asked) == ["a", "b"]
    assert [file.name for file in tmp_path.iterdir()] == ["conversion.json"]


def test_a_shard_that_was_cut_or_deleted_is_written_again(tmp_path):
    folder = write(tmp_path)
    before = hashes(folder)
    os.truncate(folder / FILES[0], 10)
    (folder / FILES[2]).unlink()
    with pytest.raises(ValueError, match=f"damaged or absent.*{FILES[0]}, {FILES[2]};"):
        verify(folder)
    with pytest.raises(TypeError):
        ShardWriter(folder, planned(), SIZE).write(lambda name: None + name)
    assert not (folder / INDEX).exists()
    write(folder)
    assert hashes(folder) == before


def test_verify_finds_one_wrong_bit(tmp_path):
    file = write(tmp_path) / FILES[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"damaged or absent in .*: {FILES[1]};"):
        verify(tmp_path)


KILLED = """
import os, shutil, signal, sys
from tests.safetensors.test_folder import FILES, ShardWriter, hashes, planned, values, write
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
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=60
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
        with pytest.raises(
            OSError, match=rf"full at c: the rest of the file needs 128 bytes, \d+ are free.*{FILES[1]}"
        ) as caught:
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


def test_a_target_is_checked_without_being_made(tmp_path, monkeypatch):
    absent = tmp_path / "a" / "b"
    check_target(absent, 1)
    assert not absent.parent.exists()
    folder = write(tmp_path / "new")
    (folder / FILES[2]).unlink()
    needed = sum(ShardWriter(folder, planned(), SIZE).num_bytes(file) for file in FILES)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    check_target(folder, needed + 10)  # what is finished needs no more room
    for target, size in ((folder, needed + 11), (absent, 11)):
        with pytest.raises(OSError, match="need 11 bytes and 10 are free"):
            check_target(target, size)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes").touch()
    with pytest.raises(ValueError, match="holds notes and no conversion"):
        check_target(tmp_path / "foreign", 1)
    with pytest.raises(ValueError, match="notes is a file"):
        check_target(tmp_path / "foreign" / "notes", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": SHAPES | {"a": ("F32", (5, 3))}},
        {"max_shard_bytes": 200},
        {"metadata": {"format": "np"}},
        {"source": "step 2"},
    ],
    ids=["shape", "size", "metadata", "source"],
)
def test_another_plan_does_not_continue_a_folder(tmp_path, change):
    before = hashes(write(tmp_path, source="step 1"))
    with pytest.raises(
        ValueError, match="other tensors, shard sizes, metadata or source: choose another folder, or delete"
    ):
        write(tmp_path, **({"source": "step 1"} | change))
    assert hashes(tmp_path) == before


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and no conversion"):
        ShardWriter(tmp_path, planned())
    with pytest.raises(ValueError, match="is a file"):
        ShardWriter(tmp_path / "notes.txt", planned())
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a conversion"):
        ShardWriter(tmp_path, planned())
    with pytest.raises(ValueError, match="does not describe a conversion"):
        verify(tmp_path / "absent")


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    writer = ShardWriter(tmp_path, planned(), SIZE)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process writes"):
        writer.write(values)
    os.close(descriptor)
    writer.write(values)


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


def test_a_large_tensor_goes_through_in_pieces(tmp_path, monkeypatch):
    shapes = {"large": ("BF16", (1 << 20, 5))}
    monkeypatch.setattr(writer_module, "_CHUNK_BYTES", 1 << 20)
    seen = []
    ShardWriter(tmp_path, planned(shapes)).write(lambda name: values(name, shapes), seen.append)
    assert max(seen) == 1 << 20
    same(Shards(tmp_path).read("large"), values("large", shapes))
    verify(tmp_path)
