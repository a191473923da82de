"""`experiments.benchmarks.engine_loop`: which tokens count."""

import pytest

from experiments.benchmarks import engine_loop


def test_tokens_count_from_the_last_warm_job_to_the_first_end(monkeypatch):
    """Bursts of two every second; the second job begins late, and the first one ends first."""
    monkeypatch.setattr(engine_loop, "WARM_UP", 3)
    first = [(float(at), 2 * at) for at in range(1, 11)]
    second = [(at + 4.0, 2 * at) for at in range(1, 11)]
    assert engine_loop.rate([first, second]) == pytest.approx(2 * 2.0)
    with pytest.raises(RuntimeError, match="the first job has ended before the last one had begun"):
        engine_loop.rate([first, [(at + 9.0, 2 * at) for at in range(1, 11)]])
