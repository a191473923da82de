"""The rules of a table: each broken once."""

import pytest

from deepseek_jax.pipeline import orders
from deepseek_jax.pipeline.schedules import one_f_one_b, schedule
from deepseek_jax.pipeline.table import Cell, Table, Work, bidirectional, interleaved, linear, v


def changed(table, device, tick, cell):
    rows = [list(row) for row in table.cells]
    rows[device][tick] = cell
    return lambda: Table(table.name, table.placement, table.num_micro_batches, tuple(map(tuple, rows)))


def test_placements_are_those_of_the_drawing():
    def drawn(placement):
        rows = range(placement.num_devices), range(placement.num_chunks)
        return " ".join("/".join(str(placement.stage(d, c)) for c in rows[1]) for d in rows[0])

    assert drawn(linear(4)) == "0 1 2 3"
    assert drawn(interleaved(4, 2)) == "0/4 1/5 2/6 3/7"
    assert drawn(v(4)) == "0/7 1/6 2/5 3/4"
    assert drawn(bidirectional(4)) == "0/3 1/2 2/1 3/0"


def test_half_of_the_micro_batches_come_from_each_end():
    table = schedule("dualpipe", 4, 8)
    assert [table.route(i)[0].device for i in range(8)] == [0, 0, 0, 0, 3, 3, 3, 3]
    assert [table.route(i)[-1].device for i in range(8)] == [3, 3, 3, 3, 0, 0, 0, 0]


def test_a_cell_that_needs_what_is_not_there_yet():
    # device 0: F0 F1 .  .  BW0 .   BW1
    # device 1: .  F0 BW0 F1 .. as 1f1b(2, 2) lays it out
    table = one_f_one_b(2, 2)
    assert str(table.cells[1][1]) == "F(0, chunk 0)"
    rows = [list(row) for row in table.cells]
    rows[1][0], rows[1][1] = rows[1][1], None
    with pytest.raises(ValueError, match=r"device 1, tick 0, F\(0, chunk 0\): F needs F of stage 0"):
        Table("moved", table.placement, 2, tuple(map(tuple, rows)))


def test_weights_before_their_gradients():
    cells = ((orders.forward(0), orders.weights(0), orders.inputs(0)),)
    with pytest.raises(ValueError, match=r"device 0, tick 1, W\(0, chunk 0\): W needs B of stage 0.*from tick 2 on"):
        Table("one", linear(1), 1, cells)


def test_backward_in_the_tick_after_forward_but_not_before():
    Table("one", linear(1), 1, ((orders.forward(0), orders.full(0)),))
    with pytest.raises(ValueError, match=r"tick 0, B\(0, chunk 0\) W\(0, chunk 0\): B needs F of stage 0"):
        Table("one", linear(1), 1, ((orders.full(0), orders.forward(0)),))


def test_gradients_take_a_tick_to_the_next_device():
    rows = [[orders.forward(0), None, orders.full(0)], [None, orders.forward(0), orders.full(0)]]
    with pytest.raises(ValueError, match=r"device 0, tick 2.*: B needs B of stage 1, which is there from tick 3 on"):
        Table("hasty", linear(2), 1, tuple(map(tuple, rows)))


def test_work_done_twice_or_never():
    table = one_f_one_b(2, 2)
    idle = table.cells[0].index(None)
    with pytest.raises(ValueError, match=rf"device 0, tick {idle}, F\(1, chunk 0\): its F is in tick 1 already"):
        changed(table, 0, idle, orders.forward(1))()
    with pytest.raises(ValueError, match="device 0 has no F of micro-batch 1, chunk 0"):
        changed(table, 0, 1, None)()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (orders.forward(2), r"device 1, tick 0, F\(2, chunk 0\): there is no micro-batch 2 among 2"),
        (orders.forward(0, chunk=1), r"device 1, tick 0, F\(0, chunk 1\): its micro-batch does not pass this chunk"),
    ],
)
def test_work_that_does_not_exist(cell, message):
    with pytest.raises(ValueError, match=message):
        changed(one_f_one_b(2, 2), 1, 0, cell)()


def test_rows_of_different_lengths_and_micro_batches_that_do_not_divide():
    with pytest.raises(ValueError, match=r"rows of \[1, 0\] ticks; 2 devices need one equal row each"):
        Table("x", linear(2), 1, ((None,), ()))
    with pytest.raises(ValueError, match="3 micro-batches do not divide among 2 routes"):
        Table("x", bidirectional(2), 3, ((None,), (None,)))


@pytest.mark.parametrize(
    ("works", "message"),
    [
        ({}, "an idle tick is None"),
        ({"forward": Work(0, 0), "backward": Work(1, 0)}, "must hold one of F, B, W, BW, FBW"),
        ({"backward": Work(0, 0), "weight": Work(1, 0)}, "B and W in one tick must be of the same"),
        ({"forward": Work(0, 0), "backward": Work(0, 0), "weight": Work(0, 0)}, "must be in different ticks"),
    ],
)
def test_cells_that_nobody_can_run(works, message):
    with pytest.raises(ValueError, match=message):
        Cell(**works)


def test_orders_that_wait_for_each_other():
    stuck = [[orders.forward(0), orders.full(0)], [orders.full(0), orders.forward(0)]]
    with pytest.raises(ValueError, match=r"in tick 1 every device waits.*0: 'B\(0, chunk 0\).*1: 'B\(0, chunk 0\)"):
        orders.lay_out("stuck", linear(2), 1, stuck)
