"""The programs of a batch are compiled side by side, and an error ends that."""

import threading

import pytest

from deepseek_jax.inference import row_calls


class FakeCalls(row_calls.Calls):
    """Calls without arrays, whose programs `make` makes."""

    def __init__(self, names, make):
        self._all, self._made, self._make = names, [], make

    def _names(self):
        return [(name,) for name in self._all]

    def _program(self, name):
        self._made.append(name)
        return self._make(*name)


def test_programs_are_compiled_side_by_side_and_all_are_told_of(monkeypatch):
    monkeypatch.setattr(row_calls.os, "cpu_count", lambda: 2)
    both_run = threading.Barrier(2, timeout=120)  # nobody passes it alone
    calls, told = FakeCalls(range(4), lambda _: both_run.wait()), []
    calls.compile(lambda done, total: told.append((done, total)), ())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(calls._made) == [(0,), (1,), (2,), (3,)]


def test_after_an_error_no_other_program_is_begun(monkeypatch):
    monkeypatch.setattr(row_calls.os, "cpu_count", lambda: 1)
    begun, failed = threading.Event(), threading.Event()

    def make(name):
        if name == 0:
            raise ValueError("too large")
        begun.set()
        assert failed.wait(120)

    class Stopping(row_calls.ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(wait=False, **options)
            failed.set()
            super().shutdown()

    monkeypatch.setattr(row_calls, "ThreadPoolExecutor", Stopping)
    calls = FakeCalls(range(5), make)
    with pytest.raises(ValueError, match="too large"):
        calls.compile(None, ())
    assert len(calls._made) <= 2 and (0,) in calls._made
