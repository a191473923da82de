"""A file is replaced whole or not at all; results come in order, and no more than asked for are on their way."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_jax.files import in_order, replacing, write_atomically


@pytest.mark.parametrize(
    ("content", "expected"), [("東京\r\n", "東京\r\n".encode()), (b"\xff\x00", b"\xff\x00"), ("", b"")]
)
def test_content_replaces_what_was_there(tmp_path, content, expected):
    path = tmp_path / "file"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == expected
        assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "write", lambda descriptor, data: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_atomically(tmp_path / "file", "0123456789")
    assert (tmp_path / "file").read_text() == "0123456789"


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with replacing(path) as first, replacing(path) as second:  # two writers have a file each
        os.write(first, b"first")
        os.write(second, b"second")
        assert path.read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 3
    assert path.read_text() == "first"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_results_come_in_order_with_a_bounded_number_ahead(ahead):
    later, read = threading.Event(), []

    def items():
        for i in range(20):
            read.append(i)
            yield i

    def square(i):
        if i == 0:
            later.wait(0.2)  # so that others are done before the first
        return i * i

    with ThreadPoolExecutor(3) as pool:
        for i, result in enumerate(in_order(pool, square, items(), ahead)):
            assert result == i * i
            assert len(read) - i <= ahead
    assert i == 19


def test_what_an_item_raises_comes_in_its_place():
    taken = []
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        taken.extend(in_order(pool, lambda i: 6 // i, [3, 2, 0, 1], 4))
    assert taken == [2, 3]
