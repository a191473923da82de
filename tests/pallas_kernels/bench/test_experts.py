"""The benchmark of experts at decode, as far as a machine without a GPU can show it: operands, bytes, a row."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.bench import experts
from pallas_kernels.bench.experts import Shape

NANO = Shape("nano", 8, 2, 256, 128)


def test_bytes_are_those_of_three_matrices():
    assert experts.SHAPES["v3_5b"].expert_bytes(in_fp8=False) == 3 * 2048 * 1024 * 2
    assert experts.SHAPES["v3"].expert_bytes(in_fp8=True) == 3 * 7168 * 2048


def test_turns_move_every_expert_on_and_leave_the_others_out():
    moved = np.asarray(experts.turns(NANO, np.array([[0, 7], [8, 3]], np.int32)))
    assert sorted(moved[:, 0, 0].tolist()) == list(range(8))
    assert (moved[:, 1, 0] == 8).all()


@pytest.mark.parametrize("routing", ["spread", "skewed", "one"])
def test_a_token_has_each_expert_once(routing):
    chosen, gates = experts.choose(NANO, 50, routing)
    assert gates.shape == chosen.shape == (50, 2)
    assert all(len(set(row) - {8}) == len([e for e in row if e < 8]) for row in chosen.tolist())


def test_a_row_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(experts, "CALLS", 2)
    monkeypatch.setattr(experts, "REPEATS", 1)
    on_cpu = functools.partial(experts.experts_decode)  # the function itself, before it is replaced
    monkeypatch.setattr(experts, "experts_decode", lambda *operands, **_: on_cpu(*operands, implementation="reference"))
    weights = experts.make_weights(NANO, False, jax.random.key(0))
    call, floor, error = experts.measure(NANO, False, 2, "spread", weights, read=1e9)
    assert call["value"] > 0
    assert floor["value"] == pytest.approx(floor["shape"]["touched experts"] * 3 * 256 * 128 * 2 / 1e3)
    assert error["value"] < 5e-3
    assert "nano" in capsys.readouterr().out
