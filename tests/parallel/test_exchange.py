"""`all_to_all` equals `local`, its specification: values, every gradient, rounds, and memory that knows no worst case.

The experts of most tests are tanh(x W_e), dense and written here, so that a fault of the exchange cannot hide behind
one of the FFN.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Mesh
from deepseek_jax.model.experts_blocks import expert_ffn
from deepseek_jax.parallel.exchange import exchange
from deepseek_jax.parallel.mesh import make_mesh, vary
from deepseek_jax.parallel.rows import gather_rows, sum_rows
from deepseek_jax.parameters import EXPERTS, ROWS, P

T, K, E, D = 24, 2, 16, 8  # T tokens per device
DEVICES = 8
MESHES = {"1x8": (1, 1, 8), "2x4 nodes": (1, 2, 4), "2x2x2": (2, 2, 2)}
# Sums of at most K = 2 rows forward and T * DEVICES rows in a weight's gradient, FP32, in another order.
ROUNDING = 1e-6


def mesh_of(sizes):
    return make_mesh(
        Mesh(pipe=1, data=sizes[0], node=sizes[1], expert=sizes[2], tensor=1), jax.devices()[: math.prod(sizes)]
    )


def tanh_experts(weights, x_TD, gates_TK, experts_TK):
    """Gated sum of tanh(x W_e), computed for every expert; ids outside contribute nothing."""
    y_TEF = jnp.tanh(jnp.einsum("td,edf->tef", x_TD, weights))
    gate_TE = (gates_TK[..., None] * (experts_TK[..., None] == jnp.arange(weights.shape[0]))).sum(1)
    return jnp.einsum("tef,te->tf", y_TEF, gate_TE)


def routes(case, rng):
    """Expert ids [DEVICES * T, K]."""
    tokens = DEVICES * T
    balanced = np.stack([rng.permutation(E)[:K] for _ in range(tokens)])
    # on 2x2x2 the data groups need different rounds
    skewed_half = np.where(np.arange(tokens)[:, None] < tokens // 2, balanced, 5)
    return {
        "balanced": balanced,
        "one expert": np.full((tokens, K), 5),
        "one device": np.tile([2, 3], (tokens, 1)),  # on one device of every mesh here
        "padding": np.where(rng.random((tokens, 1)) < 0.3, E, balanced),
        "only padding": np.full((tokens, K), E),
        "skewed half": skewed_half,
    }[case].astype(np.int32)


CASES = ("balanced", "one expert", "one device", "padding", "only padding", "skewed half")


def inputs(case, seed=0):
    rng = np.random.default_rng(seed)
    x_TD, weights_EDD = rng.normal(size=(DEVICES * T, D)), rng.normal(size=(E, D, D)) / math.sqrt(D)
    gates_TK, g_TD = rng.random((DEVICES * T, K)), rng.normal(size=(DEVICES * T, D))
    floats = (a.astype(np.float32) for a in (x_TD, gates_TK, weights_EDD, g_TD))
    return routes(case, rng), *floats


def value_and_gradients(apply):
    """(experts, x, gates, weights, g) -> y and the three gradients of sum(y * g)."""

    def run(experts_TK, x_TD, gates_TK, weights, g_TD):
        y_TD, pull = jax.vjp(lambda *floats: apply(experts_TK, *floats), x_TD, gates_TK, weights)
        return {"y": y_TD} | dict(zip(("x", "gates", "weights"), pull(g_TD), strict=True))

    return run


@functools.cache
def on_one_device():
    def apply(experts_TK, x_TD, gates_TK, weights):
        return exchange(x_TD, experts_TK, gates_TK, weights, tanh_experts, transport="local", num_experts=E, slack=1.0)

    return jax.jit(value_and_gradients(apply))


def sharded(sizes, local, out_specs):
    """`local` inside a checked shard_map: rows over ROWS, weights over EXPERTS."""
    rows = P(ROWS, None)
    run = jax.shard_map(local, in_specs=(rows, rows, rows, P(EXPERTS), rows), out_specs=out_specs)

    def call(*arrays):
        with jax.set_mesh(mesh_of(sizes)):
            return jax.device_get(
                compiled(
                    *(
                        jax.device_put(a, spec)
                        for a, spec in zip(arrays, (rows, rows, rows, P(EXPERTS), rows), strict=True)
                    )
                )
            )

    compiled = jax.jit(run)
    return call


@functools.cache
def on_mesh(sizes, slack):
    def apply(experts_TK, x_TD, gates_TK, weights):
        return exchange(
            x_TD,
            experts_TK,
            gates_TK,
            vary(weights, x_TD),
            tanh_experts,
            transport="all_to_all",
            num_experts=E,
            slack=slack,
        )

    rows = P(ROWS, None)
    return sharded(sizes, value_and_gradients(apply), {"y": rows, "x": rows, "gates": rows, "weights": P(EXPERTS)})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slack", [1.0, 2.0])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_all_to_all_equals_local(sizes, slack, case):
    arrays = inputs(case)
    want, got = jax.device_get(on_one_device()(*arrays)), on_mesh(sizes, slack)(*arrays)
    for name, value in want.items():
        assert np.linalg.norm(got[name] - value) <= ROUNDING * np.linalg.norm(value), name
    assert bool(np.any(want["y"])) == (case != "only padding")


def predicted_rounds(experts_TK, sizes, slack):
    """Rounds of each device by definition: the fullest (sender, destination) pair of its data group, in capacities."""
    parts = sizes[1] * sizes[2]
    capacity = math.ceil(slack * T * K / parts)
    destination = experts_TK.reshape(sizes[0], parts, T * K) // (E // parts)
    counts = (destination[..., None] == np.arange(parts)).sum(2)  # data group, sender, destination
    return np.repeat(-(-counts.max((1, 2)) // capacity), parts)


@pytest.mark.parametrize(("sizes", "slack", "case", "rounds"), [
    # In one round at slack 2, in parts / slack when all go one way.
    ((1, 1, 8), 2.0, "balanced", {1}),
    ((1, 1, 8), 2.0, "one expert", {4}),
    ((1, 1, 8), 1.0, "one expert", {8}),
    ((1, 2, 4), 2.0, "one device", {4}),
    ((1, 1, 8), 2.0, "only padding", {0}),
    ((2, 2, 2), 1.0, "skewed half", {2, 4}),
])  # fmt: skip
def test_rounds_are_as_many_as_the_fullest_destination_needs(sizes, slack, case, rounds):
    """Counted where they happen: each device's experts run once per round, and once in a round of nothing."""
    calls = collections.Counter()

    def counting(weights, x_TD, gates_TK, experts_TK):
        device = sum(
            jax.lax.axis_index(axis) * stride
            for axis, stride in zip(ROWS, (sizes[1] * sizes[2], sizes[2], 1), strict=True)
        )
        jax.debug.callback(lambda d: calls.update([int(d)]), device)
        return tanh_experts(weights, x_TD, gates_TK, experts_TK)

    def local(experts_TK, x_TD, gates_TK, weights, _):
        return exchange(
            x_TD,
            experts_TK,
            gates_TK,
            vary(weights, x_TD),
            counting,
            transport="all_to_all",
            num_experts=E,
            slack=slack,
        )

    arrays = inputs(case)
    sharded(sizes, local, P(ROWS, None))(*arrays)
    jax.effects_barrier()
    predicted = predicted_rounds(arrays[0], sizes, slack)
    assert set(predicted.tolist()) == rounds
    assert [calls[d] for d in range(DEVICES)] == np.maximum(predicted, 1).tolist()


@pytest.mark.parametrize("case", ["balanced", "one expert", "padding"])
def test_combine_of_dispatch_is_the_identity(case):
    """Experts return their rows and gates sum to one: every token comes back bit for bit, and padding as zero."""

    def identity(weights, x_TD, gates_TK, experts_TK):
        here = (experts_TK >= 0) & (experts_TK < E // DEVICES)
        return x_TD * jnp.where(here, gates_TK, 0.0).sum(1, keepdims=True)

    def local(experts_TK, x_TD, gates_TK, weights, _):
        return exchange(x_TD, experts_TK, gates_TK, weights, identity, transport="all_to_all", num_experts=E, slack=1.0)

    experts_TK, x_TD, _, *rest = inputs(case)
    halves_TK = np.full((DEVICES * T, K), 1 / K, np.float32)
    got = sharded((1, 1, 8), local, P(ROWS, None))(experts_TK, x_TD, halves_TK, *rest)
    np.testing.assert_array_equal(got, np.where(experts_TK[:, :1] == E, 0, x_TD))


def test_gather_and_sum_of_rows_transpose_each_other():
    """<gather_rows(x), y> = <x, sum_rows(y)>.

    Each slot has a row of its own; some slots are empty, and one assignment has no slot.
    """
    rng = np.random.default_rng(0)
    slots_TK = np.array([[0, 4], [2, 6], [5, 1]], np.int32)  # 6 is no slot; slot 3 is empty
    source_W = np.array([0, 5, 2, 6, 1, 4], np.int32)
    x_TD, y_WD = rng.normal(size=(3, D)).astype(np.float32), rng.normal(size=(6, D)).astype(np.float32)
    gathered_WD, summed_TD = gather_rows(x_TD, source_W, slots_TK), sum_rows(y_WD, source_W, slots_TK)
    np.testing.assert_array_equal(gathered_WD[3], 0)
    np.testing.assert_allclose(np.vdot(gathered_WD, y_WD), np.vdot(x_TD, summed_TD), rtol=1e-6)
    (dx_TD,) = jax.vjp(lambda x: gather_rows(x, source_W, slots_TK), x_TD)[1](jnp.asarray(y_WD))
    np.testing.assert_array_equal(dx_TD, summed_TD)


BIG_T, BIG_K, BIG_D, BIG_F, LOCAL = 512, 8, 224, 64, 4  # V3's proportions: K = 8, D = 3.5 F


@functools.cache
def peak_bytes(devices, slack):
    """Compiled bytes per device (arguments, results, temporaries) of an exchange with the real experts.

    Forward and backward, FP32.
    """
    mesh, ffn = mesh_of((1, 1, devices)), functools.partial(expert_ffn, block=16, wave=4)

    def loss(x_TD, gates_TK, weights, experts_TK):
        weights = jax.tree.map(lambda w: vary(w, x_TD), weights)
        y_TD = exchange(
            x_TD, experts_TK, gates_TK, weights, ffn, transport="all_to_all", num_experts=LOCAL * devices, slack=slack
        )
        return jnp.sum(y_TD * y_TD)

    def abstract(axes, leading, *dims, dtype=jnp.float32):
        sharding = jax.sharding.NamedSharding(mesh, P(axes, *(None,) * len(dims)))
        return jax.ShapeDtypeStruct((leading * devices, *dims), dtype, sharding=sharding)

    weights = {
        "gate_up_ED2F": abstract(EXPERTS, LOCAL, BIG_D, 2, BIG_F),
        "down_EFD": abstract(EXPERTS, LOCAL, BIG_F, BIG_D),
    }
    x_TD, gates_TK = abstract(ROWS, BIG_T, BIG_D), abstract(ROWS, BIG_T, BIG_K)
    experts_TK = abstract(ROWS, BIG_T, BIG_K, dtype=jnp.int32)
    specs = (P(ROWS), P(ROWS), P(EXPERTS))
    with jax.set_mesh(mesh):
        run = jax.shard_map(jax.grad(loss, (0, 1, 2)), in_specs=(*specs, P(ROWS)), out_specs=specs)
        stats = jax.jit(run).lower(x_TD, gates_TK, weights, experts_TK).compile().memory_analysis()
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def balanced_minimum():
    """What a perfect exchange holds in the experts' backward pass, with no row to spare and nothing computed twice.

    Per row, T * K of them: the input that arrived, the pre-activations (2 F), the gradient that arrived, and the
    gradient to send back. Besides, arguments and results: tokens, gates and weights with their gradients, and the ids.
    Buffers of the other collectives fit where these will be or were.
    """
    per_row = 3 * BIG_D + 2 * BIG_F
    in_and_out = 2 * (BIG_T * BIG_D + BIG_T * BIG_K + LOCAL * 3 * BIG_D * BIG_F) + BIG_T * BIG_K
    return 4 * (BIG_T * BIG_K * per_row + in_and_out)


def test_peak_memory_is_at_most_three_times_the_balanced_minimum():
    """At the default slack of 2: half of the buffers' rows are spare. Measured: 2.9."""
    assert peak_bytes(8, 2.0) <= 3.0 * balanced_minimum()


def test_peak_memory_does_not_know_the_worst_case():
    """At worst a device of eight receives four times what a device of two does. Measured: the same within 1%."""
    assert peak_bytes(8, 2.0) <= 1.05 * peak_bytes(2, 2.0)
