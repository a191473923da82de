"""How errors become messages and exit codes."""

import json
import logging
import os
import sys

import pytest
from absl import app
from absl import logging as absl_logging

from deepseek_jax.training.checkpoint import SaveError
from deepseek_jax.training.loop import NonFiniteError
from experiments import command, session


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("seed = -1; raise it"), 2, "seed = -1; raise it"),
        (NotImplementedError("no kernel; use 'auto'"), 2, "no kernel; use 'auto'"),
        (app.UsageError("give a word"), 2, "give a word"),
        (SaveError("the disk is full"), 1, "the disk is full"),
        (NonFiniteError("step 3"), 1, "step 3"),
        (OSError(28, "No space left on device", "/a/b\x1b"), 1, "No space left on device: /a/b\\x1b"),
        (MemoryError("cannot allocate 5 TB"), 1, "cannot allocate 5 TB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nlong\nlist\nof\nbuffers"), 1, "9 bytes;"),
        (
            RuntimeError("INTERNAL: " + "x" * 300 + "\nRESOURCE_EXHAUSTED: 7 GiB\nbuffers"),
            1,
            "(RESOURCE_EXHAUSTED: 7 GiB;",
        ),
        (MemoryError("std::bad_alloc"), 1, "set execution.remat = 'full'"),
        (MemoryError(), 1, "out of memory (MemoryError; this machine has"),
    ],
)
def test_errors_of_users_and_machines_are_one_message(capsys, monkeypatch, error, code, says):
    monkeypatch.setattr(sys, "argv", ["train"])
    assert command.report("experiments.train", error) == code
    printed = capsys.readouterr().err
    assert printed.startswith("experiments.train: ") and says in printed
    assert len(printed.splitlines()) == 1 and "Traceback" not in printed


def test_notes_of_an_error_are_in_its_message(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    error = ValueError("the prompt is empty; give one")
    error.add_note("in the rollout of prompts 4 to 5; the last checkpoint stays")
    assert command.report("experiments.train", error) == 2
    want = (
        "experiments.train: the prompt is empty; give one\nin the rollout of prompts 4 to 5; the last checkpoint stays"
    )
    assert capsys.readouterr().err.strip() == want


def test_a_fault_of_ours_shows_where(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    try:
        raise KeyError("a\x1b[31mb")
    except KeyError as error:
        assert command.report("experiments.train", error) == 1
    printed = capsys.readouterr().err
    assert "test_command.py" in printed and "KeyError" in printed and "\x1b" not in printed


def test_a_message_is_whole_and_short():
    assert command.message("one\x1b[2J\n two \n") == "one\\x1b[2J\ntwo"
    assert command.message("another config:\n  a: 1\n  b: 2\n  c: 3") == "another config: a: 1; b: 2; c: 3"


def test_a_models_text_has_no_escape_codes_on_a_terminal(monkeypatch):
    text = "a\x1b[31m\n\tb\x07"
    assert command.for_terminal(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command.for_terminal(text) == "a\\x1b[31m\n\tb\\x07"


def test_without_a_home_nothing_is_kept(monkeypatch, caplog):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    kept, enabled = session.jax.config.jax_compilation_cache_dir, []
    monkeypatch.setattr(session.Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(session.export_cache, "enable", enabled.append)
    session.jax.config.update("jax_compilation_cache_dir", None)
    try:
        session.use_compilation_cache()
        assert session.jax.config.jax_compilation_cache_dir is None and enabled == [None]
    finally:
        session.jax.config.update("jax_compilation_cache_dir", kept)


def test_simulated_devices_wait_for_each_other(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=7")
    changed = {}
    monkeypatch.setattr(session.jax.config, "update", changed.__setitem__)
    session.simulate_devices(64)
    assert changed == {"jax_platforms": "cpu", "jax_num_cpu_devices": 64}
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_cpu_collective_call_terminate_timeout_seconds=7",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=86400",
    ]


def test_an_error_of_a_library_says_how_to_see_where(capsys):
    """A ValueError that code beneath ours raised may be a fault of ours that looks like the user's."""
    with pytest.raises(ValueError) as ours:
        raise ValueError("seed = -1; raise it")
    with pytest.raises(ValueError) as theirs:
        json.loads("{")
    assert (command.report("name", ours.value), command.report("name", theirs.value)) == (2, 2)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "name: seed = -1; raise it" and second.endswith("; --traceback shows where")


def test_a_warning_has_no_prefix_of_absl(monkeypatch, capsys):
    record = logging.makeLogRecord({"levelno": 30, "levelname": "WARNING", "msg": "%s is odd", "args": ("a\x1b",)})
    handler = absl_logging.get_absl_handler()
    monkeypatch.setattr(handler.python_handler, "stream", sys.stderr)
    monkeypatch.setattr(handler.python_handler, "formatter", handler.python_handler.formatter)
    monkeypatch.setattr(handler, "filters", [])
    command.tell_plainly()
    handler.handle(record)
    assert capsys.readouterr().err.splitlines()[-1] == "warning: a\\x1b is odd"  # before it absl's word on flags
