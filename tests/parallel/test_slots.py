"""Slots: each assignment once, in a slot of its expert, in the order of all tokens; ranges cut them without loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.slots import assign, num_ranges, routing
from deepseek_jax.parameters import EXPERTS, ROWS, P
from tests.model.test_experts_blocks import CASES, E, K, T, draw_ids
from tests.support.meshes import mesh_of


def test_worked_example():
    """The example of `parallel/slots.py`."""
    assigned = assign(jnp.asarray([[1], [0], [1], [1], [2], [1]], jnp.int32), 3, 2, ())
    np.testing.assert_array_equal(assigned.slot_TK.ravel(), [2, 0, 3, 4, 6, 5])
    np.testing.assert_array_equal(assigned.rows_E, [2, 4, 2])
    plan = routing(assigned.device_TK, assigned.slot_TK, assigned.rows_E, 8, 0, 0)
    np.testing.assert_array_equal(plan.source_Z, [1, 6, 0, 2, 3, 5, 4, 6])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unit", [1, 4, 16])
def test_every_assignment_has_one_slot_of_its_expert(unit, case):
    ids = draw_ids(case)
    assigned = assign(jnp.asarray(ids), E, unit, ())
    num_slots = (T * K // unit + E) * unit
    plan = routing(assigned.device_TK, assigned.slot_TK, assigned.rows_E, num_slots, 0, 0)
    here = np.flatnonzero((ids.ravel() >= 0) & (ids.ravel() < E))
    source_Z, slots = np.asarray(plan.source_Z), np.asarray(plan.slots_WK).ravel()
    filled = source_Z < T * K
    np.testing.assert_array_equal(np.sort(source_Z[filled]), here)
    np.testing.assert_array_equal(source_Z[slots[here]], here)
    assert (slots[np.setdiff1d(np.arange(T * K), here)] == num_slots).all()
    expert = np.repeat(np.arange(E), plan.rows_E)
    np.testing.assert_array_equal(expert[np.flatnonzero(filled)], ids.ravel()[source_Z[filled]])
    counts = np.bincount(ids.ravel()[here], minlength=E)
    np.testing.assert_array_equal(plan.rows_E, -(-counts // unit) * unit)


@pytest.mark.parametrize("case", CASES)
def test_ranges_together_are_the_whole(case):
    unit, num_slots = 4, 8
    ids = draw_ids(case)
    assigned = assign(jnp.asarray(ids), E, unit, ())
    ranges = int(num_ranges(assigned.rows_E, num_slots))
    parts = [routing(*assigned[:3], num_slots, index, 0) for index in range(ranges)]
    sources = np.concatenate([part.source_Z for part in parts]) if parts else np.zeros(0, int)
    here = np.flatnonzero((ids.ravel() >= 0) & (ids.ravel() < E))
    np.testing.assert_array_equal(np.sort(sources[sources < T * K]), here)
    np.testing.assert_array_equal(sum((part.rows_E for part in parts), np.zeros(E, int)), assigned.rows_E)
    for part in parts:  # the rows of a range lie from its first slot on
        expert = np.repeat(np.arange(E), part.rows_E)
        filled = np.flatnonzero(part.source_Z < T * K)
        np.testing.assert_array_equal(expert[filled], ids.ravel()[part.source_Z[filled]])


def test_senders_know_the_order_of_one_batch():
    """Slots that 8 devices give their own tokens are those that one device gives to all tokens, device by device."""
    ids = np.random.default_rng(0).integers(0, 17, (8 * 12, 3)).astype(np.int32)  # 16: nowhere
    mesh = mesh_of(node=2, expert=4)

    def local(ids):
        assigned = assign(ids, 16, 4, EXPERTS)
        return assigned.device_TK, assigned.slot_TK, assigned.rows_E

    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(local, in_specs=P(ROWS), out_specs=(P(ROWS), P(ROWS), P(ROWS))))
        device_TK, slot_TK, rows_E = jax.device_get(run(jax.device_put(ids, P(ROWS, None))))
    whole = jax.device_get(assign(jnp.asarray(ids), 16, 4, ()))
    np.testing.assert_array_equal(rows_E, whole.rows_E)
    first_E = np.repeat(np.cumsum(rows_E.reshape(8, 2).sum(1)) - rows_E.reshape(8, 2).sum(1), 2)
    there = ids < 16
    np.testing.assert_array_equal(device_TK, np.where(there, ids // 2, -1))
    np.testing.assert_array_equal((slot_TK + first_E[np.minimum(ids, 15)])[there], whole.slot_TK[there])
