"""The lock of a folder: one owner, named to others, and none when its process is dead."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from deepseek_jax import locks
from deepseek_jax.locks import LOCK, locked

HOLD = """
import pathlib, sys
from deepseek_jax.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def test_a_second_owner_is_refused_with_the_first_ones_name(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on host .* since 20"):
        locked(tmp_path).__enter__()
    with locked(tmp_path) as abandoned:
        assert not abandoned
    assert not list(tmp_path.iterdir())


def test_a_dead_owner_keeps_nobody_out_and_is_noticed(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    owner.stdout.readline()
    with pytest.raises(ValueError, match=f"process {owner.pid} "), locked(tmp_path):
        pass
    owner.kill()
    owner.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path) as abandoned:
        assert abandoned
    assert not list(tmp_path.iterdir())


def test_the_next_owner_waits_some_time(tmp_path, monkeypatch):
    """On a clock of the test's: the first owner ends after three tries, or does not."""
    now, first = [0.0], locked(tmp_path)
    first.__enter__()

    def sleep(seconds):
        now[0] += seconds
        if now[0] == pytest.approx(3 * seconds):
            first.__exit__(None, None, None)

    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with locked(tmp_path, wait_seconds=30.0):
        assert now[0] == pytest.approx(3 * locks.SECONDS_BETWEEN_TRIES)
        now[0] = 10.0
        with pytest.raises(ValueError, match="in use by process"):
            locked(tmp_path, wait_seconds=2.0).__enter__()
        assert now[0] == pytest.approx(12.0, abs=locks.SECONDS_BETWEEN_TRIES)


def test_a_lock_that_its_owner_just_removed_is_none(tmp_path, monkeypatch):
    """The owner ends between our opening of its file and our lock on it: a third would lock another file."""
    (tmp_path / LOCK).write_text("")
    opened = []

    def open_then_remove(path, *arguments):
        opened.append(descriptor := real(path, *arguments))
        if len(opened) == 1:
            os.unlink(path)
        return descriptor

    real = os.open
    monkeypatch.setattr(os, "open", open_then_remove)
    with locked(tmp_path):
        assert len(opened) == 2 and os.path.samestat(os.stat(tmp_path / LOCK), os.fstat(opened[1]))


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ValueError, match=r"\.lock cannot be written: Is a directory"), locked(tmp_path):
        pass
    (tmp_path / LOCK).rmdir()
    (tmp_path / LOCK).symlink_to(tmp_path / "foreign")
    with pytest.raises(ValueError, match="cannot be written"), locked(tmp_path):
        pass
    with pytest.raises(ValueError, match="No such file"), locked(tmp_path / "absent"):
        pass
