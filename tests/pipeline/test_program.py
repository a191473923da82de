"""A program, run by an interpreter that moves names instead of arrays: every read must find the right one."""

import numpy as np
import pytest

from deepseek_jax.pipeline.program import KIND_CODES, LEFT, NOTHING, RIGHT, SELF, allocate, compile_table, links
from deepseek_jax.pipeline.schedules import SCHEDULES, schedule
from deepseek_jax.pipeline.simulation import live
from tests.pipeline.test_schedules import sizes

KINDS = {code: kind for kind, code in KIND_CODES.items()}


class Device:
    """The buffers of a device; reads and writes check that the slot exists."""

    def __init__(self, program, device):
        self.numbers = {name: array[device].tolist() for name, array in program.arrays().items()}
        self.kept = [None] * program.num_slots
        self.pending = [None] * program.num_pending
        self.inboxes = {"activation": [None] * program.num_activations, "gradient": [None] * program.num_gradients}
        self.done = []

    def at(self, tick):
        return {name: row[tick] for name, row in self.numbers.items()}

    def compute(self, now, last_stage):
        """Run a cell; return what it sends: (noun, where, name)."""
        kind, sent = KINDS[now["kind"]], []
        if "B" in kind:
            work = now["backward_micro_batch"], now["backward_stage"]
            assert self.kept[now["backward_slot"]] == work
            if work[1] < last_stage:
                assert self.inboxes["gradient"][now["backward_inbox"]] == work
            else:
                assert now["backward_inbox"] == NOTHING
            if "W" not in kind:
                self.pending[now["backward_pending"]] = work
            sent.append(("gradient", now["backward_to"], (work[0], work[1] - 1)))
            self.done.append(("B", *work))
        if "W" in kind:
            work = now["weight_micro_batch"], now["weight_stage"]
            assert self.kept[now["weight_slot"]] == work
            if "B" not in kind:
                assert self.pending[now["weight_pending"]] == work
            self.done.append(("W", *work))
        if "F" in kind:  # last: it may not touch what B and W of its cell read
            work = now["forward_micro_batch"], now["forward_stage"]
            if work[1] > 0:
                assert self.inboxes["activation"][now["forward_inbox"]] == work
            else:
                assert now["forward_inbox"] == NOTHING
            assert "B" not in kind or now["forward_slot"] != now["backward_slot"]
            self.kept[now["forward_slot"]] = work
            sent.append(("activation", now["forward_to"], (work[0], work[1] + 1)))
            self.done.append(("F", *work))
        return sent


def interpret(program):
    table = program.table
    num_devices, last_stage = table.num_devices, table.placement.num_stages - 1
    devices = [Device(program, d) for d in range(num_devices)]
    for tick in range(table.num_ticks):
        sent = [device.compute(device.at(tick), last_stage) for device in devices]
        arrived = {}
        for d, messages in enumerate(sent):
            for noun, where, name in messages:
                assert (where in (LEFT, RIGHT, SELF)) == (0 <= name[1] <= last_stage)
                if where in (LEFT, RIGHT):
                    arrived[(d + where) % num_devices, f"{noun}_from_{'left' if where == RIGHT else 'right'}"] = name
                elif where == SELF:
                    arrived[d, f"{noun}_from_self"] = name
        for d, device in enumerate(devices):
            for field, slot in device.at(tick).items():
                if "_from_" in field:
                    name = arrived.pop((d, field), None)
                    assert (slot == NOTHING) == (name is None)
                    if name is not None:
                        device.inboxes[field.partition("_")[0]][slot] = name
        assert not arrived
    return devices


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_read_finds_what_it_needs_in_as_many_slots_as_works_are_held(name):
    for p, m, chunks in sizes(name):
        table = schedule(name, p, m, chunks)
        program = compile_table(table)
        assert program.num_slots == live(table).max(), (p, m, chunks)
        devices = interpret(program)
        done = sorted(work for device in devices for work in device.done)
        assert done == sorted(
            (part, i, s) for part in "FBW" for i in range(m) for s in range(table.placement.num_stages)
        )
        for array in program.arrays().values():
            assert (array.shape, array.dtype) == ((p, table.num_ticks), np.int32)


def test_inboxes_stay_shallow():
    """What waits for a device is a small part of what it holds, at the report's size too."""
    program = compile_table(schedule("dualpipe", 16, 120))
    assert (program.num_slots, program.num_activations, program.num_gradients, program.num_pending) == (17, 2, 2, 8)
    straight = compile_table(schedule("1f1b", 16, 32))
    assert (straight.num_activations, straight.num_gradients, straight.num_pending) == (1, 1, 0)


def test_what_nobody_sends_has_no_column():
    straight = compile_table(schedule("1f1b", 4, 8))
    unused = [name for name, array in straight.arrays().items() if "_from_" in name and (array == NOTHING).all()]
    assert unused == ["activation_from_right", "activation_from_self", "gradient_from_left", "gradient_from_self"]
    folded = compile_table(schedule("dualpipev", 4, 8))
    assert ((folded.forward_to == SELF).any(axis=1) == [False, False, False, True]).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_chunks_that_go_around_close_the_ring(name):
    """Links are the pairs that send, no more: a chain of three for four devices, or all four of a ring."""
    program = compile_table(schedule(name, 4, 8))
    for noun, part in (("activation", "forward"), ("gradient", "backward")):
        for side, step in (("left", RIGHT), ("right", LEFT)):
            senders = np.flatnonzero((getattr(program, f"{part}_to") == step).any(axis=1)).tolist()
            pairs = links(getattr(program, f"{noun}_from_{side}"), step)
            assert sorted(pairs) == [(device, (device + step) % 4) for device in senders]
            assert len(pairs) in ((0, 4) if name == "interleaved" else (0, 3))


def test_as_few_slots_as_spans_overlap_at_once():
    random = np.random.default_rng(0)
    for _ in range(50):
        starts = random.integers(0, 30, 20)
        spans = [(int(s), int(s + n)) for s, n in zip(starts, random.integers(1, 9, 20), strict=True)]
        slots, num_slots = allocate(spans)
        assert num_slots == max(sum(s <= t < e for s, e in spans) for t in range(40))
        for t in range(40):
            taken = [slot for slot, (s, e) in zip(slots, spans, strict=True) if s <= t < e]
            assert len(taken) == len(set(taken))
