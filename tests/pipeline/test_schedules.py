"""Schedules against the formulas of the report's Table 2, and goldens of a simulation of DualPipe's order."""

import numpy as np
import pytest

from deepseek_jax.pipeline.schedules import SCHEDULES, schedule
from deepseek_jax.pipeline.simulation import Durations, cost, live, run

TWO_COPIES = ("dualpipe",)


def sizes(name):
    """Yield (devices, micro-batches, chunks) that a schedule takes, small and odd ones among them."""
    for p in (1, 2, 3, 4, 5, 8, 12):
        if name == "interleaved":
            yield from ((p, p * rounds, chunks) for rounds in (1, 2, 3) for chunks in (2, 3) if p < 12)
        elif name == "dualpipe":
            yield from ((p, m, None) for m in (2 * p, 2 * p + 2, 4 * p + 6) if p % 2 == 0)
        elif name == "dualpipev":
            yield from ((p, m, None) for m in (2 * p, 2 * p + 1, 4 * p + 3))
        else:
            yield from ((p, m, None) for m in (1, 2, p, p + 1, 3 * p))


def fills(name, p, m):
    return m >= (2 * p if name.startswith("dualpipe") else p)


def expected_idle(name, p, durations):
    """The idle time of a device by the formulas of the report's Table 2; GPipe and interleaved have 1F1B's.

    They hold with at least P micro-batches (DualPipe and DualPipeV: 2P). The table's PP counts stages, and DualPipeV
    has two a device.
    """
    f, b, w, both = durations.forward, durations.full, durations.weights, durations.pair
    return {
        "gpipe": (p - 1) * (f + b),
        "1f1b": (p - 1) * (f + b),
        "interleaved": (p - 1) * (f + b),
        "zb1p": (p - 1) * (f + b - 2 * w),
        "dualpipe": (p / 2 - 1) * (both + b - 3 * w),
        "dualpipev": (p - 1) * (both + b - 3 * w),
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("durations", [Durations(), Durations(2.0, 2.0, 1.5, 5.0)], ids=["even", "uneven"])
def test_idle_time_is_that_of_the_formula(name, durations):
    """A table that exists obeys every rule, so this also says that each schedule does, at each size."""
    for p, m, chunks in sizes(name):
        table = schedule(name, p, m, chunks)
        idle = run(table, durations).idle
        if fills(name, p, m):
            assert idle.max() == pytest.approx(expected_idle(name, p, durations)), (p, m, chunks)
        assert idle.min() >= 0


@pytest.mark.parametrize(("p", "m"), [(8, 20), (8, 32), (16, 32), (16, 64), (16, 120)])
def test_dualpipe_has_the_idle_times_of_the_published_order(p, m):
    table = schedule("dualpipe", p, m)
    even, overlapped = run(table, Durations()), run(table, Durations(overlapped=2.5))
    middle = {8: 4.5, 16: 10.5}[p]
    ends = {8: 3.5, 16: 7.5}[p]
    np.testing.assert_array_equal(even.idle, {8: 6.0, 16: 14.0}[p])
    assert overlapped.idle.max() == overlapped.idle[p // 2 - 1] == overlapped.idle[p // 2] == middle
    assert overlapped.idle.min() == overlapped.idle[0] == overlapped.idle[-1] == ends
    np.testing.assert_array_equal(live(table), p + 1)
    if (p, m) == (8, 20):
        assert (even.makespan, overlapped.makespan) == (66, 59)
    if (p, m) == (16, 120):
        pairs = [sum(cell is not None and cell.kind == "FBW" for cell in row) for row in table.cells]
        assert (pairs[0], pairs[7], pairs[8], pairs[15]) == (97, 103, 103, 97)


def test_zb1p_beside_dualpipe_as_in_the_report():
    durations = Durations()  # (F, B, W) = (1, 2, 1)
    found = [run(schedule(name, 16, 32), durations).idle.max() for name in ("1f1b", "zb1p", "dualpipe")]
    assert found == [45, 15, 14]


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_and_parameters_are_those_of_the_report(name):
    for p, m, chunks in sizes(name):
        table = schedule(name, p, m, chunks)
        most = live(table)
        stages = table.placement.num_stages
        if name == "gpipe":
            np.testing.assert_array_equal(most, m)
        if name == "1f1b":
            np.testing.assert_array_equal(most, np.minimum(m, p - np.arange(p)))
        if name == "zb1p":
            np.testing.assert_array_equal(most, min(m, p))
        if name == "interleaved":
            bound = 2 * (p - 1 - np.arange(p)) + (chunks - 1) * p + 1
            np.testing.assert_array_equal(most, np.minimum(m * chunks, bound))
        if name in ("dualpipe", "dualpipev"):
            np.testing.assert_array_equal(most, stages + 1)
        parameters = cost(table, Durations()).parameters
        assert parameters == (2 if name in TWO_COPIES else 1)


def test_a_cost_is_in_parts_of_the_model():
    """Two chunks a device are half as large each: half of the idle time, of 1F1B's and of DualPipe's."""
    durations = Durations(overlapped=2.5)
    assert cost(schedule("interleaved", 4, 8), durations).idle == cost(schedule("1f1b", 4, 8), durations).idle / 2
    folded, straight = cost(schedule("dualpipev", 4, 8), durations), cost(schedule("dualpipe", 8, 16), durations)
    assert (folded.idle, folded.activations) == (straight.idle / 2, straight.activations / 2)


def test_neighbours_that_wait_for_each_other_lose_time():
    """1F1B's neighbours do F beside BW; parts of equal length lose nothing."""
    times = {name: cost(schedule(name, 8, 32), Durations()) for name in SCHEDULES}
    assert times["1f1b"].makespan_in_step > times["1f1b"].makespan
    assert times["zb1p"].makespan_in_step == times["zb1p"].makespan
    for name, found in times.items():
        assert found.idle_in_step - found.idle == found.makespan_in_step - found.makespan >= 0, name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ("dualpip", 4, 8),
            "there is no schedule 'dualpip': did you mean dualpipe or dualpipev?; schedules are gpipe,",
        ),
        (
            ("zzz", 4, 8),
            "there is no schedule 'zzz'; schedules are gpipe, 1f1b, interleaved, zb1p, dualpipe, dualpipev",
        ),
        (("gpipe", 0, 8), "at least 1 device and 1 micro-batch, not 0 and 8"),
        (("1f1b", 4, 0), "at least 1 device and 1 micro-batch, not 4 and 0"),
        (("dualpipe", 5, 10), "5 devices are odd; take 6, or dualpipev with 5 devices"),
        (("dualpipe", 4, 9), "9 micro-batches are odd; take 10"),
        (("dualpipe", 4, 6), "6 are too few for 4 devices; take at least 8"),
        (("dualpipev", 4, 7), "7 are too few for 4 devices; take at least 8"),
        (("interleaved", 4, 10), "10 do not divide among 4 devices; take 8 or 12"),
        (("interleaved", 4, 3), "3 do not divide among 4 devices; take 4"),
        (("interleaved", 4, 8, 1), "at least 2 chunks a device, not 1; with one it is 1f1b"),
        (("1f1b", 4, 8, 2), "1f1b has 1 chunk a device, not 2; interleaved has any"),
        (("dualpipe", 4, 8, 1), "dualpipe has 2 chunks a device, not 1"),
    ],
)
def test_refusals_name_the_numbers(asked, message):
    with pytest.raises(ValueError) as found:
        schedule(*asked)
    assert message in str(found.value)


@pytest.mark.parametrize("wrong", [{"forward": 0.0}, {"weights": -1.0}, {"overlapped": float("nan")}])
def test_durations_are_above_zero(wrong):
    with pytest.raises(ValueError, match="every duration must be above 0"):
        Durations(**wrong)
