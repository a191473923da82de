"""A folder is verified against its record, and what would spoil one is refused."""

import json
import os
import shutil

import pytest

from deepseek_jax.locks import locked
from deepseek_jax.safetensors.folder import INDEX
from deepseek_jax.safetensors.record import check_target, verify
from deepseek_jax.safetensors.writer import ShardWriter
from tests.support.shards import FILES, SIZE, hashes, planned, values, write


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


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and no conversion"):
        ShardWriter(tmp_path, planned())
    with pytest.raises(ValueError, match="is a file"):
        ShardWriter(tmp_path / "notes.txt", planned())
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a conversion"):
        ShardWriter(tmp_path, planned())
    with pytest.raises(ValueError, match="conversion.json cannot be read: No such file"):
        verify(tmp_path / "absent")


WRONG_RECORDS = {
    "no sha": lambda shards: shards[FILES[0]].pop("sha256"),
    "sha is a number": lambda shards: shards[FILES[0]].update(sha256=1),
    "bytes is a text": lambda shards: shards[FILES[0]].update(bytes="1"),
    "shard is a list": lambda shards: shards.update({FILES[0]: []}),
    "elsewhere": lambda shards: shards.update({"../x": shards[FILES[0]]}),
}


@pytest.mark.parametrize("case", WRONG_RECORDS)
def test_wrong_records_are_refused(tmp_path, case):
    record = json.loads((write(tmp_path) / "conversion.json").read_text())
    WRONG_RECORDS[case](record["shards"])
    (tmp_path / "conversion.json").write_text(json.dumps(record))
    for use in (lambda: verify(tmp_path), lambda: check_target(tmp_path, 1), lambda: ShardWriter(tmp_path, planned())):
        with pytest.raises(ValueError, match="does not describe a conversion .*: delete the folder and convert again"):
            use()


def test_a_record_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "conversion.json").mkdir()
    with pytest.raises(ValueError, match="conversion.json is a folder; .* or delete the folder and convert again"):
        check_target(tmp_path, 1)


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Also of the files beside the weights."""
    left = tmp_path / "tokenizer_config.json.partial-host-12-3"
    left.touch()
    check_target(tmp_path, 1)
    write(tmp_path)
    assert not left.exists()


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    writer = ShardWriter(tmp_path, planned(), SIZE)
    with locked(tmp_path), pytest.raises(ValueError, match="in use by process"):
        writer.write(values)
    writer.write(values)
