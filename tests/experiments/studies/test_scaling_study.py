"""`experiments.studies.scaling_study` quantises as the kernels do, and shows what the report saw."""

import ml_dtypes
import numpy as np

from experiments.studies import scaling_study
from pallas_kernels.quantize import quantize_blocks, quantize_tiles
from pallas_kernels.quantized import dequantize


def test_tiles_and_blocks_are_those_of_the_kernels():
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    for group, quantize in (((1, 128), quantize_tiles), ((128, 128), quantize_blocks)):
        ours = scaling_study.quantized(x.astype(np.float64), ml_dtypes.float8_e4m3fn, group)
        kernels = np.asarray(dequantize(quantize(x)), np.float64)
        assert np.isclose(ours, kernels, rtol=1e-6).mean() > 0.999  # but for ties that FP32 scales decide otherwise


def test_one_large_token_costs_a_block_the_others():
    errors = {}
    for spread in (0.0, 4.0):
        for record in scaling_study.measure(spread):
            errors[record["mode"], record["op"].split()[0], spread] = record["value"]
    assert errors["tiles", "input", 4.0] == errors["tiles", "input", 0.0]  # a token's scale is its own
    assert errors["blocks", "input", 4.0] > 10 * errors["tiles", "input", 4.0]
    assert errors["tiles", "weight", 4.0] < errors["blocks", "weight", 4.0] / 5
    assert errors["hybrid", "weight", 0.0] > 1.8 * errors["tiles", "weight", 0.0]
