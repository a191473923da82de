"""The benchmark of the router, as far as a machine without a GPU can show it: bytes, and a row."""

import jax.numpy as jnp
import pytest

from pallas_kernels.bench import routing
from pallas_kernels.bench.routing import Shape


def test_bytes_are_those_of_three_parts():
    assert [shape.bytes for shape in routing.SHAPES] == [2048 * 64 * 6, 7168 * 256 * 6]


def test_a_row_is_measured(monkeypatch, capsys):
    times = iter([3.0, 8.0, 18.0])  # emptying the cache, the kernel behind it, XLA's kernels behind it
    monkeypatch.setattr(routing, "microseconds", lambda *_: next(times))
    monkeypatch.setattr(routing, "FACES", ("auto", "reference"))
    kernel, floor, equal = routing.measure(Shape("nano", 128, 64), 3, jnp.zeros(8, jnp.uint32), read=1e9)
    assert (kernel["value"], kernel["yardstick"], equal["value"]) == (5.0, 15.0, 1.0)
    assert floor["value"] == pytest.approx(128 * 64 * 6 / 1e3)
    assert "nano" in capsys.readouterr().out
