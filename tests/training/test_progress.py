"""The progress bar: what it prints on a terminal and elsewhere."""

import io
from types import SimpleNamespace

from deepseek_jax.progress import Bar
from deepseek_jax.training.progress import ProgressBar


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("deepseek_jax.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    file = io.StringIO()
    bar = ProgressBar(1000, 200, file)
    for step in range(1, 9):
        now[0] = 100.0 + 4.0 * step
        bar.show(200 + 100 * step, step, 2.0)
    bar.close()
    shown = file.getvalue().splitlines()
    assert len(shown) == 4
    assert shown[-1] == "train 100.0%  step 8  loss 2.000  25 tokens/s  ETA 00:00"
    assert shown[1] == "train 60.0%  step 4  loss 2.000  25 tokens/s  ETA 00:16"


def test_short_work_without_a_terminal_shows_no_line_and_no_carriage_return(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("deepseek_jax.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    file = io.StringIO()
    with Bar(100, "tokenize", file=file) as bar:
        for _ in range(10):
            bar.update(10)
    assert not file.getvalue()
    with Bar(100e6, "tokenize", file=file) as bar:
        for _ in range(10):
            now[0] += 4.0
            bar.update(10e6)
    shown = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and len(shown) == 4
    assert shown[0] == "tokenize 30.0%  2.5 MB/s  ETA 00:28"
    assert shown[-1] == "tokenize 100.0%  2.5 MB/s  ETA 00:00"


def test_the_last_step_may_exceed_the_total(monkeypatch):
    file = io.StringIO()
    bar = ProgressBar(1000, 0, file)
    bar.show(1007, 1, 2.0)
    bar.close()
    assert file.getvalue().startswith("train 100.0%  step 1")


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    bar = ProgressBar(1000, 0, file)
    bar.show(500, 1, 2.5)
    bar.note("a line")
    bar.close()
    assert "loss=2.500" in file.getvalue() and "50%" in file.getvalue() and "a line\n" in file.getvalue()
