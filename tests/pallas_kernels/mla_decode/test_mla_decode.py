"""MLA decode against FP64 on ragged, poisoned cases: the specification, its door, and the schedule of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_decode
from pallas_kernels.mla_decode.schedule import PAGE, make_schedule
from tests.pallas_kernels.mla_decode import cases

# lengths of 0, of fewer tokens than queries, at and beside the ends of pages
RAGGED = (1, 0, 64, 65, 200, 3, 127)


@pytest.mark.parametrize("queries", [1, 4])
def test_the_reference_equals_fp64_and_leaks_no_nan(queries):
    operands = cases.make(RAGGED, queries, heads=3, key=40, page=16, dtype=jnp.float32)
    result = mla_decode.mla_decode(*operands, scale=0.2, value_dim=32, implementation="reference")
    out, lse = cases.errors(result, cases.expected(*operands, scale=0.2, value=32))
    assert out < 1e-6 and lse < 1e-6


def test_in_bf16_only_the_result_is_rounded():
    operands = cases.make((130, 64), 2, heads=4)
    result = mla_decode.mla_decode(*operands, scale=cases.SCALE, implementation="reference")
    out, lse = cases.errors(result, cases.expected(*operands))
    assert result[0].dtype == jnp.bfloat16 and out < 2e-3 and lse < 2e-6


def test_what_nobody_wrote_changes_no_bit():
    q, cache, tables, lengths = cases.make(RAGGED, 2, heads=2, key=24, page=16, dtype=jnp.float32)
    call = lambda cache, tables: mla_decode.mla_decode(  # noqa: E731
        q, cache, tables, lengths, scale=0.2, value_dim=16, implementation="reference"
    )
    clean = jnp.nan_to_num(cache, nan=0.0), jnp.where(tables == cases.FOREIGN, 0, tables)
    for poisoned, want in zip(call(cache, tables), call(*clean), strict=True):
        np.testing.assert_array_equal(poisoned, want)


def test_a_query_sees_its_own_token_and_none_behind_it():
    """Two queries equal one query of a shorter sequence, and one of the whole."""
    q, cache, tables, lengths = cases.make((33, 16, 17), 2, heads=2, key=24, page=16, dtype=jnp.float32)
    how = {"scale": 0.2, "value_dim": 16, "implementation": "reference"}
    both, _ = mla_decode.mla_decode(q, cache, tables, lengths, **how)
    for query, behind in ((0, 1), (1, 0)):
        alone, _ = mla_decode.mla_decode(q[:, query, None], cache, tables, lengths - behind, **how)
        np.testing.assert_allclose(both[:, query], alone[:, 0], rtol=1e-6, atol=1e-7)


def check_schedule(lengths, num_parts, unit, overhead, schedule):
    parts, fragments, sequences = (np.asarray(x) for x in (schedule.parts, schedule.fragments, schedule.sequences))
    units = -(-lengths // (unit * PAGE))
    seen = [[] for _ in lengths]  # of each sequence: its fragments' pages, in order
    costs, visited = [], []
    for first, count, *fields in parts:
        cost = 0
        np.testing.assert_array_equal(fields, fragments[first, :6])
        for number in range(first, first + count):
            visited.append(number)
            sequence, start, end, split, length = fragments[number, :5]
            if end > start:
                seen[sequence].append((number, range(start, end)))
                assert length == lengths[sequence] and start % unit == end % unit == 0
                assert split == (sequences[sequence, 1] > 1)
                cost += (end - start) // unit + overhead * (1 + split)
                assert (end - start == units[sequence] * unit) != split, "split is a sequence of several fragments"
        costs.append(cost)
    assert len(visited) == len(set(visited)), "a fragment is visited twice"
    for sequence, found in enumerate(seen):
        pages = [page for _, pages in found for page in pages]
        assert pages == list(range(units[sequence] * unit)), "each page exactly once, in order"
        first, count = sequences[sequence]
        assert count == len(found) and [number for number, _ in found] == list(range(first, first + count))
    assert max(costs) <= cost_of_all_parts(units, num_parts, overhead), "no longer than if all parts were used"


def cost_of_all_parts(units, num_parts, overhead):
    """Return the cost of the longest of `num_parts` equal parts, place by place."""
    places = [(i, place >= overhead) for i, n in enumerate(units) for place in range(overhead + n)]
    used = min(num_parts, len(places))
    longest = 0
    for part in range(used):
        inside = places[part * len(places) // used : (part + 1) * len(places) // used]
        taken = np.bincount([i for i, is_unit in inside if is_unit], minlength=len(units))
        cut = (taken > 0) & (taken < units)
        longest = max(longest, taken.sum() + overhead * ((taken > 0).sum() + cut.sum()))
    return longest


def test_equal_sequences_are_not_cut_for_a_few_idle_multiprocessors():
    schedule = make_schedule(np.full(128, 1024, np.int32), 132, unit=1, overhead=1)
    np.testing.assert_array_equal(schedule.sequences[:, 1], 1)


def test_every_page_is_in_one_fragment_and_parts_are_equal():
    rng = np.random.default_rng(0)
    schedule_of = jax.jit(make_schedule, static_argnames=("num_parts", "unit", "overhead"))
    for batch, num_parts, unit, overhead in ((1, 132, 1, 1), (5, 7, 2, 0), (16, 66, 2, 2), (130, 132, 1, 5)):
        for _ in range(6):
            lengths = (10 ** rng.uniform(0, 4.5, batch)).astype(np.int32) * (rng.uniform(size=batch) > 0.2)
            lengths = lengths.astype(np.int32)
            schedule = schedule_of(lengths, num_parts=num_parts, unit=unit, overhead=overhead)
            check_schedule(lengths, num_parts, unit, overhead, schedule)
    nothing = np.zeros(3, np.int32)
    check_schedule(nothing, 4, 1, 1, make_schedule(nothing, 4, unit=1, overhead=1))


def good():
    return cases.make((70, 0), 1, heads=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, c, t, n: (q[0], c, t, n), r"q has shape \(1, 2, 576\)"),
        (lambda q, c, t, n: (q.astype(jnp.float32), c, t, n), "float32 and cache bfloat16"),
        (lambda q, c, t, n: (q[..., :512], c, t, n), "512 dims.*576"),
        (lambda q, c, t, n: (jnp.tile(q, (1, 5, 1, 1)), c, t, n), "5 queries"),
        (lambda q, c, t, n: (q, c, t[:1], n), r"int32 \(1, 3\)"),
        (lambda q, c, t, n: (q, c, t.astype(jnp.int16), n), "int16"),
        (lambda q, c, t, n: (q, c, t, n.astype(jnp.float32)), "lengths is float32"),
        (lambda q, c, t, n: (q, c, t, n - 1), "-1"),
        (lambda q, c, t, n: (q, c, t, n + 500), "570 tokens"),
        (lambda q, c, t, n: ("q", c, t, n), "q is of type str"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        mla_decode.mla_decode(*change(*good()), scale=1.0, implementation="reference")


def test_other_widths_have_no_hopper_kernel():
    operands = cases.make((20,), 1, heads=2, key=40, page=16, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="float32; use 'auto'"):
        mla_decode.mla_decode(*operands, scale=1.0, value_dim=32, implementation="hopper")
    with pytest.raises(ValueError, match="fastest"):
        mla_decode.mla_decode(*operands, scale=1.0, value_dim=32, implementation="fastest")
