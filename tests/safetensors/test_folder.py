"""What is written is read, by us and by the safetensors library; what is damaged is refused."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.safetensors import folder as folder_module
from deepseek_jax.safetensors.folder import INDEX, Shards, compare
from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.safetensors.record import verify
from deepseek_jax.safetensors.writer import Planned, file_name, plan
from tests.support.shards import FILES, SHAPES, same, values, write


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


def test_we_read_the_librarys_files(tmp_path):
    arrays = {name: values(name) for name in SHAPES if SHAPES[name][0] in ("F32", "I32")}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"made": "by it"})
    shards = Shards(tmp_path)
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
    with safetensors.safe_open(folder / FILES[0], "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
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
    monkeypatch.setattr(folder_module.reader, "CHUNK_BYTES", 4096)
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
    "fields": (
        {"header": {"t": {"dtype": "U8", "shape": [1]}}, "data": b"1"},
        "t is not described in the header .*data_offsets",
    ),
    "no fields": ({"header": {"t": 1}}, "t is not described"),
    "negative": ({"header": {"t": tensor(0, 4, shape=[-4])}, "data": b"1234"}, "t is not described .*integers"),
    "float": ({"header": {"t": tensor(0, 4, shape=[4.0])}, "data": b"1234"}, "t is not described .*integers"),
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
    "outside": (lambda f: edit_index(f, lambda m: m.update(c=f"../{FILES[1]}")), "only files in the folder itself"),
    "absolute": (lambda f: edit_index(f, lambda m: m.update(c=str(f / FILES[1]))), "write their names alone into"),
    "below": (lambda f: edit_index(f, lambda m: m.update(c=f"sub/{FILES[1]}")), "only files in the folder itself"),
    "index is a folder": (lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()), "index.json is a folder"),
    "index dangles": (lambda f: ((f / INDEX).unlink(), (f / INDEX).symlink_to("no")), "index.json cannot be read"),
    "shard is a folder": (lambda f: ((f / FILES[1]).unlink(), (f / FILES[1]).mkdir()), f"{FILES[1]} is a folder"),
    "shard is a FIFO": (lambda f: ((f / FILES[1]).unlink(), os.mkfifo(f / FILES[1])), f"{FILES[1]} is a FIFO"),
    "shard dangles": (
        lambda f: ((f / FILES[1]).unlink(), (f / FILES[1]).symlink_to("no")),
        f"{FILES[1]} cannot be read: No such file",
    ),
    "shard leads to itself": (
        lambda f: ((f / FILES[1]).unlink(), (f / FILES[1]).symlink_to(FILES[1])),
        f"{FILES[1]} cannot be read: Too many levels",
    ),
    "escape codes": (
        lambda f: edit_index(f, lambda m: m.update({"\x1b[31m": "\x1b[0m"})),
        r"says that \\x1b\[31m is in \\x1b\[0m, which is absent",
    ),
    "a name of 1 MB": (
        lambda f: edit_index(f, lambda m: m.update({"n" * 10**6: FILES[0]})),
        r"^.{,999}says that n{100}\.\.\.n{100} is in",
    ),
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


def test_an_index_may_say_that_a_file_is_here(tmp_path):
    edit_index(write(tmp_path), lambda files: files.update({name: f"./{file}" for name, file in files.items()}))
    assert Shards(tmp_path).entries.keys() == SHAPES.keys()


def test_a_tensor_whose_name_is_an_escape_code_or_long(tmp_path):
    raw(tmp_path / "model.safetensors", {"\x1b[31m": tensor(0, 1), "n" * 10**6: tensor(1, 2)}, b"12")
    with pytest.raises(ValueError, match=r"2 extra: \\x1b\[31m in .*, n{50,}\.\.\.n{50,} in") as caught:
        compare(Shards(tmp_path), {})
    assert len(str(caught.value)) < 1000


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
