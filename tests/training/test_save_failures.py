"""A save that fails ends at once, names the remedy for its error, and leaves the earlier checkpoints alone."""

import errno
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from orbax.checkpoint._src.multihost import multihost

from configs.deepseek_v3 import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.storage import error_number, remedy
from deepseek_jax.training.checkpoint import Checkpoints, Progress, SaveError
from tests.support.patience import SECONDS, wait_for

CONFIG = from_config_dict(get_config())
ORBAX_WAITS = 3 * int(SECONDS)  # for a signal that never comes: longer than the test waits for Orbax's threads


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a step; the checkpoint of step 1 is there."""
    mesh = jax.make_mesh((8,), ("data",))
    state = {"params": {"w_D": jax.device_put(np.arange(64.0), jax.NamedSharding(mesh, jax.P("data")))}}
    checkpoints = Checkpoints(tmp_path, 2)

    def save_step(step):
        with jax.set_mesh(mesh):
            checkpoints.save(state, Progress(step=step, tokens_seen=step, data=None), CONFIG, {}, mesh)
            checkpoints.wait()

    save_step(1)
    yield save_step
    checkpoints.close()


def refuse(monkeypatch, name, where, number):
    """Make `os.<name>` fail with an error of the system for paths that contain `where`."""
    original = getattr(os, name)

    def failing(path, *arguments, **options):
        if where in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, name, failing)


def waiting_threads():
    """Return Orbax's threads that write or wait; they keep a process alive, unlike idle workers of pools."""
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "_SignalingThread"]


@pytest.mark.parametrize(
    ("number", "folder", "words"),
    [
        (errno.ENOSPC, "/2.orbax", "GiB are free there: make room"),
        (errno.ENOSPC, "/state.orbax", "GiB are free there: make room"),
        (errno.EACCES, "/run.orbax", "change the owner or the permissions"),
        (errno.EMFILE, "/tokenizer.orbax", "ulimit -n"),
        (errno.EIO, "/state.orbax", "dmesg"),
    ],
)
def test_a_folder_that_cannot_be_made_ends_the_save_at_once(save, monkeypatch, tmp_path, capfd, number, folder, words):
    refuse(monkeypatch, "mkdir", folder, number)
    monkeypatch.setattr(multihost, "coordination_timeout", lambda: ORBAX_WAITS)
    with pytest.raises(SaveError, match=f"(?s){os.strerror(number)}.*step 1 is intact") as caught:
        save(2)
    assert words in str(caught.value)
    assert ("make room" in str(caught.value)) == (number == errno.ENOSPC)
    wait_for(lambda: not waiting_threads())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_rename_that_fails_ends_the_save_at_once(save, monkeypatch):
    """The last act of a save; it happens in the background."""
    refuse(monkeypatch, "rename", "/2.orbax", errno.EDQUOT)
    refuse(monkeypatch, "replace", "/2.orbax", errno.EDQUOT)
    with pytest.raises(SaveError, match=r"(?s)quota.*step 1 is intact.*make room"):
        save(2)


def test_a_lost_folder_is_named(save, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("something else")
    with pytest.raises(SaveError, match=r"(?s)the folder cannot be read.*was removed or replaced"):
        save(2)


def test_the_number_of_an_error_is_found_in_what_wraps_it(tmp_path):
    tensorstore = ValueError("Error writing \"x\": No space left on device [os_error_code='28']")
    assert error_number(tensorstore) == errno.ENOSPC
    outer = RuntimeError("a save failed")
    outer.__cause__ = OSError(errno.EROFS, "Read-only file system")
    assert error_number(outer) == errno.EROFS
    assert error_number(RuntimeError("no number")) is None
    assert "read-only" in remedy(outer, tmp_path)
    assert remedy(tensorstore, tmp_path / "gone", " (or save less)") == "make room (or save less)"
