"""The journal: every line that a person saw, with its time, over all starts of a run."""

import io
import logging
import re
from types import SimpleNamespace

import pytest
from absl import logging as absl_logging

from deepseek_jax.training import journal as module
from deepseek_jax.training.journal import journal, record, say
from deepseek_jax.training.progress import ProgressBar


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self):
        return True


def lines(workdir):
    text = (workdir / "log.txt").read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in text.splitlines())
    return [line[21:] for line in text.splitlines()]


def test_lines_and_warnings_are_kept_over_restarts(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with journal(tmp_path):
        say("tiny:\n  model")
        absl_logging.warning("the checkpoint is damaged")
        logging.getLogger("of a library").warning("waits")
    with journal(tmp_path):
        bar = ProgressBar(100, 0)
        bar.note("compiling ...")
        bar.close()
    say("nobody keeps this")
    expected = ["tiny:", "  model", "warning: the checkpoint is damaged", "warning: waits", "compiling ..."]
    assert lines(tmp_path) == expected
    assert capsys.readouterr().out == "tiny:\n  model\nnobody keeps this\n"


def test_a_start_that_is_refused_leaves_no_journal(tmp_path):
    with pytest.raises(ValueError), journal(tmp_path / "new"):
        absl_logging.warning("something odd")
        raise ValueError("another config")
    assert not (tmp_path / "new").exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError), journal(tmp_path):
        raise ValueError("another config")
    assert not (tmp_path / "log.txt").exists()


def test_what_came_before_the_run_owned_its_workdir_is_kept(tmp_path):
    with journal(tmp_path):
        record("said early")
        (tmp_path / "config.json").write_text("{}")
        record("said late")
    assert lines(tmp_path) == ["said early", "said late"]


def test_the_error_that_ends_a_run_is_noted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError), journal(tmp_path):
        record("step 1")
        raise OSError("the disk is full")
    assert lines(tmp_path) == ["step 1", "ended by OSError: the disk is full"]


def test_a_full_disk_does_not_stop_the_run_here(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with journal(tmp_path):
        record("lost")


def test_a_bar_on_a_terminal_is_noted_now_and_then(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("deepseek_jax.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    (tmp_path / "config.json").write_text("{}")
    with journal(tmp_path):
        bar = ProgressBar(1000, 0, Terminal())
        for step in range(1, 10):
            bar.show(100 * step, step, 2.0)
            now[0] += 20.0
        bar.close()
    kept = lines(tmp_path)
    assert [line.split("  loss")[0] for line in kept] == [
        "train 40.0%  step 4",
        "train 70.0%  step 7",
    ]


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(module, "_is_first", lambda: False)
    with journal(tmp_path):
        say("the first says it")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "log.txt").exists()
