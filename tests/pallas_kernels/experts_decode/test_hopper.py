"""The kernels of experts at decode in the interpreter of their machine, against FP64.

Products are plain there. Which expert is read, in which slot, with which rows, and the barriers are those of the
kernels.
"""

import dataclasses
import functools

import jax
import pytest

from pallas_kernels.experts_decode import hopper, hopper_sort, hopper_stream, reference
from pallas_kernels.quantized import Quantized
from tests.pallas_kernels.experts_decode import cases


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    """Each block has several units, and not all blocks equally many."""
    for module in (hopper, hopper_sort, hopper_stream):
        monkeypatch.setattr(module, "num_multiprocessors", lambda: 3)


def check(interpret, operands, tolerance):
    *_, gate_up, down = operands
    in_fp8, num_experts = isinstance(gate_up, Quantized), down.shape[0]
    config = dataclasses.replace(hopper.CONFIGS[in_fp8, operands[1].shape[0] <= 32], interpreted=True, turned=True)
    run = functools.partial(hopper.experts_decode, num_experts=num_experts, config=config)
    result = interpret(run, *operands, jax.numpy.int32(0))
    face = functools.partial(reference.experts_decode, num_experts=num_experts)
    want = jax.jit(face)(*operands, jax.numpy.int32(0)) if in_fp8 else cases.expected(*operands)
    assert cases.error(result, want) < tolerance


def test_dense_visits_in_bf16(interpret):
    """Experts in two words of bits, fewer tokens than rows."""
    check(interpret, cases.make(3, 2, 40, 256, 128), 5e-3)


def test_a_unit_in_three_shares(interpret):
    """One expert, whose 12 steps are those of a head and two tails."""
    check(interpret, cases.in_fp8(*cases.make(1, 1, 2, 1536, 128, seed=0)), 5e-3)


def test_sorted_visits_in_fp8(interpret):
    """An expert with several visits, and some without."""
    check(interpret, cases.in_fp8(*cases.make(33, 2, 4, 256, 128, routing="one")), 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["spread", "one", "nobody"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 17, 40])
def test_other_cases(interpret, num_tokens, fp8, routing):
    operands = cases.make(num_tokens, 3, 8, 512, 256, routing=routing)
    check(interpret, cases.in_fp8(*operands) if fp8 else operands, 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [5, 34])
def test_a_token_that_is_nan_spoils_itself_only(interpret, num_tokens):
    h, *rest = cases.make(num_tokens, 2, 4, 256, 128)
    config = dataclasses.replace(hopper.CONFIGS[False, True], interpreted=True)
    run = functools.partial(hopper.experts_decode, num_experts=4, config=config)
    result = interpret(run, h.at[3].set(jax.numpy.nan), *rest, jax.numpy.int32(0))
    others = [token for token in range(num_tokens) if token != 3]
    assert cases.error(result[others], cases.expected(h, *rest)[others]) < 5e-3
