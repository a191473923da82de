"""The shapes of the benchmark: their groups, their work, and the figures that they are held against."""

import numpy as np
import pytest

from pallas_kernels.bench.shapes import (
    DENSE,
    GRADIENTS,
    GROUPED,
    MASKED,
    XLA_DENSE,
    Dense,
    Gradients,
    Grouped,
    Linear,
    Masked,
    draw_dense,
    group_sizes,
)


def test_deepgemms_figures_are_ratios_of_one_run():
    assert DENSE[XLA_DENSE].ratio == 1454 / 1545
    assert DENSE[Dense(8192, 7168, 4096)].ratio == 1440 / 1586
    assert {figure.yardstick for figure in (*GROUPED.values(), *GRADIENTS.values())} == {1545}
    assert {shape.unit: figure.yardstick for shape, figure in MASKED.items()} == {"TFLOP/s": 1545, "GB/s": 4300}
    assert all(0.5 < figure.ratio < 1.0 for rows in (DENSE, GROUPED, GRADIENTS, MASKED) for figure in rows.values())


@pytest.mark.parametrize("shape", [*GROUPED, *GRADIENTS])
def test_group_sizes_fill_the_rows(shape):
    rows = shape.rows * (shape.groups if isinstance(shape, Grouped) else 1)
    assert shape.sizes.dtype == np.int32 and shape.sizes.sum() == rows and not (shape.sizes % 128).any()
    mean = rows / shape.groups
    # 0.7 to 1.3 before they are scaled to the sum
    assert shape.sizes.min() > 0.5 * mean and 1.05 * mean < shape.sizes.max() < 1.7 * mean
    np.testing.assert_array_equal(shape.sizes, shape.sizes)  # drawn anew, and the same


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="1000 rows"):
        group_sizes(1000, 4)


def test_flops_are_those_of_the_groups():
    grouped, gradients, masked = (
        Grouped(4, 8192, 4096, 7168),
        Gradients(16, 33152, 4096, 7168),
        Masked(32, 192, 6144, 7168),
    )
    assert grouped.flops == sum(Dense(int(rows), grouped.n, grouped.k).flops for rows in grouped.sizes)
    assert gradients.flops == sum(Dense(gradients.m, gradients.n, int(rows)).flops for rows in gradients.sizes)
    assert masked.flops == sum(Dense(int(rows), masked.n, masked.k).flops for rows in masked.sizes)
    assert Linear(8192, 7168, 4096).flops == 3 * Dense(8192, 7168, 4096).flops == 6 * 8192 * 7168 * 4096


def test_drawn_shapes_are_odd_within_range_and_repeatable():
    shapes = draw_dense(20261124)
    assert len(set(shapes)) == 20 and shapes == draw_dense(20261124) and shapes != draw_dense(20261125)
    many = np.array(draw_dense(0, count=2000))
    assert (many[:, 0] % 2 == 1).all() and (many[:, 1] % 64 == 0).all() and (many[:, 2] % 128 == 0).all()
    low, high = many.min(axis=0), many.max(axis=0)
    assert (low >= [65, 512, 512]).all() and (low <= [75, 640, 640]).all()
    assert (high <= [8193, 32768, 16384]).all() and (high >= [7800, 31000, 15500]).all()
