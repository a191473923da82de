"""Paths and files that a user names."""

import os
from pathlib import Path

import pytest

from deepseek_jax.inputs import local_path, new_file, new_folder, read_bytes, read_json, read_text, shown


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gs://bucket/run", "address"),
        ("s3://bucket/run", "address"),
        ("az://bucket/run", "address"),
        ("file:///tmp/run", "address"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b", "NUL"),
        ("x" * 10_000, "too long"),
        ("~nobody-has-this-name/run", "home folder is unknown"),
    ],
)
def test_addresses_and_malformed_paths_are_refused_by_name(text, why):
    with pytest.raises(ValueError, match=why) as refusal:
        local_path(text, "--workdir")
    assert str(refusal.value).startswith("--workdir")
    assert len(str(refusal.value)) < 400


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert local_path("~/runs/a", "--workdir") == Path("/somewhere/runs/a")
    assert local_path("runs/~a", "--workdir") == Path("runs/~a")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, why in [
        ("fifo", "a FIFO"),
        ("loop", "symbolic links"),
        ("dangling", "No such file"),
        ("absent", "No such file"),
        ("", "a folder"),
    ]:
        with pytest.raises(ValueError, match=why):
            read_bytes(tmp_path / name)
    with pytest.raises(ValueError, match="a device"):
        read_bytes(Path("/dev/zero"))


def test_limits_encoding_and_depth(tmp_path):
    path = tmp_path / "file.json"
    for content, why in [
        (b"caf\xe9", "not UTF-8 text \\(byte 3\\)"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "holds a list, not a dict"),
        (b"null", "holds a NoneType"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=why) as refusal:
            read_json(path)
        assert str(path) in str(refusal.value)
    path.write_text('{"a": 1}\r\n')
    assert read_json(path) == {"a": 1}
    path.write_bytes(b"{}\r\n")
    assert read_text(path) == "{}\r\n"
    assert read_bytes(path, limit=4) == path.read_bytes()
    with pytest.raises(ValueError, match="larger than the 3 bytes"):
        read_bytes(path, limit=3)


def test_escape_codes_never_reach_the_terminal():
    assert shown("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    assert shown("\udce9") == "\\udce9"
    assert len(shown("x" * 1000)) <= 203
    assert shown("日本 é") == "日本 é"


def test_where_something_will_be_written_is_checked_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.iterdir())
    assert new_folder(f"{tmp_path}/a/b", "--workdir") == tmp_path / "a" / "b"
    assert new_folder(str(tmp_path), "--workdir") == tmp_path
    assert new_file(f"{tmp_path}/a/b.json", "--json") == tmp_path / "a" / "b.json"
    assert new_file(f"{tmp_path}/file", "--json") == tmp_path / "file"
    for name in ("file", "file/W", "link", "x" * 300):
        with pytest.raises(ValueError, match="--workdir = .* cannot be a folder.*name another"):
            new_folder(f"{tmp_path}/{name}", "--workdir")
    for name, why in {
        "": "is a folder; name a file",
        "file/x.json": "cannot be a folder",
        "x" * 300: "too long",
    }.items():
        with pytest.raises(ValueError, match=f"--json = .*{why}"):
            new_file(f"{tmp_path}/{name}", "--json")
    assert sorted(tmp_path.iterdir()) == before
