"""Rows on their way, without experts: each arrives once where it is wanted, bit for bit, and `bring` is the transpose.

The second hop has room of its own here, in both meshes, and so little that routing far from balanced needs rounds in
one hop, in the other, or in both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deepseek_jax.parallel import transport as lib
from deepseek_jax.parallel.slots import assign
from deepseek_jax.parameters import EXPERTS, ROWS, P
from pallas_kernels.quantize import quantize_tiles
from tests.support.meshes import mesh_of

T, K, E, D, DEVICES = 16, 3, 16, 128, 8
CASES = {  # expert ids [DEVICES * T, K]
    "balanced": lambda rng, t: rng.permuted(np.tile(np.arange(E), (t.size, 1)), axis=1)[:, :K],
    "one expert": lambda rng, t: np.full((t.size, K), 5),
    "copies to one device": lambda rng, t: 2 * (t[:, None] % DEVICES) + rng.integers(0, 2, (t.size, K)),
    "one node": lambda rng, t: rng.permuted(np.tile(np.arange(4), (t.size, 1)), axis=1)[:, :K],
    "one device empty": lambda rng, t: rng.integers(0, E - 2, (t.size, K)),
    "one sender alone": lambda rng, t: np.where(np.repeat(t[:, None], K, axis=1) < T, 5, E),
    "nobody": lambda rng, t: np.full((t.size, K), E),
}  # fmt: skip


@functools.cache
def program(nodes, slack):
    """Return (way, function of (experts, x, y, index, delivery)) on `nodes` nodes."""
    mesh = mesh_of(node=nodes, expert=DEVICES // nodes)
    ways = []

    def local(experts_TK, x_TD, y, index, delivery):
        way = lib.choose_transport("two_hop", T, K, (0, 0), slack)
        ways.append(way)
        device_TK = jnp.where(experts_TK < E, experts_TK // (E // DEVICES), -1)
        rounds = lib.plan_rounds(way.first, lib.first_parts(way, device_TK))
        places, serves_TK = lib.places_of(way.first, rounds, index)
        served_TK = jnp.where(serves_TK, device_TK, -1)
        told = lib.rounds_to_tell(way, rounds, served_TK)
        told_RX = assign(jnp.where(serves_TK, experts_TK, E), E, 4, EXPERTS, told).told_RX
        number_TK = lax.axis_index(EXPERTS) * T * K + jnp.arange(T * K, dtype=jnp.int32).reshape(T, K)
        routes = lib.Routes(number_TK / 8.0, served_TK, number_TK)
        tiles, routes = lib.send_routed(way.first, places, quantize_tiles(x_TD, scale="pow2"), routes)
        rounds = lib.plan_rounds(way.second, lib.second_parts(way, routes.device_WK))
        beside, _ = lib.places_of(way.second, rounds, delivery)
        tiles, routes = lib.send_routed(way.second, beside, tiles, routes)
        (x_WD,) = lib.send(way.second, beside, (lib.send(way.first, places, x_TD),))
        y_WD = jnp.resize(y, x_WD.shape)
        back_TD = lib.bring(way.first, places, lib.bring(way.second, beside, y_WD))
        products = jnp.stack([jnp.vdot(x_WD, y_WD), jnp.vdot(x_TD, back_TD)])
        counts = jnp.stack(lib.num_rounds(way, told_RX))
        return tiles.values, tiles.scales.T, routes, products[None], counts[None]

    rows = P(ROWS)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, P(), P()), out_specs=rows))

    def call(*arrays):
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, rows) for a in arrays[:3]]
            return jax.device_get(run(*placed, *arrays[3:]))

    return ways, call


def rounds_of(arrived):
    """Return the rounds of both hops, on which all devices agree."""
    counts = arrived[-1]
    assert (counts == counts[0]).all()
    return counts[0].tolist()


@pytest.mark.parametrize(("case", "nodes", "slack", "rounds"), [
    ("balanced", 2, 2.0, (1, [1])),
    ("one expert", 2, 1.0, (1, [3])),  # the second hop overflows
    ("one expert", 4, 0.5, (2, [3, 3])),  # both
    ("copies to one device", 4, 0.5, (1, [1])),
    ("one node", 4, 0.5, (2, [3, 3])),
    ("one device empty", 2, 1.0, None),
    ("one sender alone", 4, 0.5, (2, [1, 1])),  # the first
    ("nobody", 4, 0.5, (0, [])),
])  # fmt: skip
def test_each_row_arrives_once_where_it_is_wanted(case, nodes, slack, rounds):
    """And nothing arrives after the last round. What arrives is the row that its sender quantised, bit for bit."""
    ways, call = program(nodes, slack)
    rng = np.random.default_rng(0)
    experts = CASES[case](rng, np.arange(DEVICES * T)).astype(np.int32)
    x_TD, y = (rng.normal(size=(DEVICES * T, D)).astype(np.float32) for _ in range(2))
    num_first, _ = rounds_of(call(experts, x_TD, y, 0, 0))
    arrivals, num_second = [], []
    for index in range(num_first + (ways[0].first.capacity is not None)):
        num_second.append(rounds_of(call(experts, x_TD, y, index, 0))[1])
        arrivals += [(index, i, call(experts, x_TD, y, index, i)) for i in range(num_second[-1] + 1)]
    assert all(way.second.capacity is not None for way in ways)
    assert rounds is None or (num_first, num_second[:num_first]) == rounds
    want = quantize_tiles(jnp.asarray(x_TD), scale="pow2")
    seen = np.zeros(experts.size, int)
    for index, delivery, (values, scales, routes, products, _) in arrivals:
        me_W = np.repeat(np.arange(DEVICES), len(values) // DEVICES)
        row, k = np.nonzero(routes.device_WK == me_W[:, None])
        assert not row.size or (index < num_first and delivery < num_second[index])
        number = routes.slot_WK[row, k]
        np.add.at(seen, number, 1)
        np.testing.assert_array_equal(routes.device_WK[row, k], experts.ravel()[number] // 2)
        np.testing.assert_array_equal(routes.gates_WK[row, k], number.astype(np.float32) / 8)
        token = number // K
        np.testing.assert_array_equal(values[row].view(np.uint8), np.asarray(want.values)[token].view(np.uint8))
        np.testing.assert_array_equal(scales[row], np.asarray(want.scales).T[token])
        out, back = products.sum(0)
        np.testing.assert_allclose(out, back, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(seen, experts.ravel() < E)


def test_rows_are_not_sent_to_who_does_not_want_them():
    """Of every row that arrives at least one assignment is for this device; all else are empty places."""
    _, call = program(2, 2.0)
    rng = np.random.default_rng(0)
    experts = CASES["balanced"](rng, np.arange(DEVICES * T)).astype(np.int32)
    x_TD = rng.normal(size=(DEVICES * T, D)).astype(np.float32)
    values, _, routes, *_ = call(experts, x_TD, x_TD, 0, 0)
    me_W = np.repeat(np.arange(DEVICES), len(values) // DEVICES)
    wanted = (routes.device_WK == me_W[:, None]).any(1)
    assert wanted.any() and not wanted.all()
    assert (routes.device_WK[~wanted] == -1).all() and not values[~wanted].view(np.uint8).any()
