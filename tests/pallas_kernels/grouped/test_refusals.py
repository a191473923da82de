"""Products of groups refuse operands and sizes that do not fit, with their numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped
from pallas_kernels.quantized import E4M3, Quantized, scales_shape
from tests.pallas_kernels.products import tiles

NUM_GROUPS, M, N = 4, 20, 150
OPERATIONS = (
    "grouped_matmul",
    "masked_matmul",
    "grouped_matmul_accumulate",
    "grouped_matmul_bf16",
    "grouped_matmul_accumulate_bf16",
)
SIZES_ARGUMENT = {
    operation: "valid_rows" if operation == "masked_matmul" else "group_sizes" for operation in OPERATIONS
}


def abstract(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def operands(operation: str) -> dict:
    """Right operands of an operation, without numbers except for the sizes."""

    def quantized(shape, grouping):
        return Quantized(abstract(shape, E4M3), abstract(scales_shape(shape, grouping), jnp.float32), grouping)

    sizes, c = jnp.array([256, 0, 128, 0], jnp.int32), abstract((NUM_GROUPS, M, N), jnp.float32)
    blocks, rows = quantized((NUM_GROUPS, N, 256), "block"), quantized((512, 256), "tile")
    bf16 = functools.partial(abstract, dtype=jnp.bfloat16)
    return {
        "grouped_matmul": {"a": rows, "b": blocks, "group_sizes": sizes},
        "masked_matmul": {"a": quantized((NUM_GROUPS, 300, 256), "tile"), "b": blocks, "valid_rows": sizes},
        "grouped_matmul_accumulate": {
            "a": quantized((M, 512), "tile"),
            "b": quantized((N, 512), "tile"),
            "group_sizes": sizes,
            "c": c,
        },
        "grouped_matmul_bf16": {"a": bf16((512, 256)), "b": bf16((NUM_GROUPS, N, 256)), "group_sizes": sizes},
        "grouped_matmul_accumulate_bf16": {"a": bf16((512, M)), "b": bf16((512, N)), "group_sizes": sizes, "c": c},
    }[operation]


@pytest.mark.parametrize(
    ("sizes", "numbers"),
    [
        (np.array([1, 2, 3, 4], np.float32), "float32"),
        (np.array([128, 0, 0], np.int32), r"int32 \(3,\).*\(4,\)"),
        (np.array([256, -128, 0, 0], np.int32), r"-128"),
        (np.array([512, 0, 128, 0], np.int32), r"640|\[0, 300\]"),  # more than the rows; than one expert's rows
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sizes_that_do_not_fit_are_refused(operation, sizes, numbers):
    with pytest.raises(ValueError, match=numbers):
        getattr(grouped, operation)(**operands(operation) | {SIZES_ARGUMENT[operation]: sizes})


@pytest.mark.parametrize(
    ("operation", "wrong", "numbers"),
    [
        ("grouped_matmul_accumulate", {"group_sizes": np.array([64, 0, 128, 0], np.int32)}, "64.*multiple of 128"),
        ("grouped_matmul_accumulate", {"c": abstract((NUM_GROUPS, N, M), jnp.float32)}, r"\(4, 20, 150\)"),
        ("grouped_matmul_accumulate_bf16", {"c": abstract((NUM_GROUPS, M, N), jnp.bfloat16)}, "bfloat16"),
        ("grouped_matmul_accumulate_bf16", {"b": abstract((256, N), jnp.bfloat16)}, "must be equal"),
        ("grouped_matmul_accumulate", {"c": None, "group_sizes": np.array(128, np.int32)}, r"int32 \(\)"),
        ("grouped_matmul_accumulate_bf16", {"c": None, "group_sizes": np.zeros(0, np.int32)}, "at least one group"),
        ("grouped_matmul_bf16", {"a": abstract((512, 256), jnp.float32)}, "float32"),
        ("grouped_matmul_bf16", {"transpose_b": True}, r"\(512, 256\).*\(4, 256, 150\)"),
        ("grouped_matmul_bf16", {"out_dtype": jnp.float16}, "float16"),
        ("grouped_matmul", {"out_dtype": jnp.int32}, "int32"),
        ("grouped_matmul", {"a": tiles(8, 384)}, r"\(8, 384\).*\(4, 150, 256\)"),
        ("grouped_matmul", {"b": tiles(8, 256)}, "'tile'.*'block'"),
        ("masked_matmul", {"a": tiles(8, 256)}, r"\(8, 256\).*3 dims"),
    ],
)
def test_wrong_operands_are_refused(operation, wrong, numbers):
    with pytest.raises(ValueError, match=numbers):
        getattr(grouped, operation)(**operands(operation) | wrong)


def test_experts_of_both_operands_are_equal():
    right = operands("masked_matmul")
    fewer = Quantized(abstract((3, 300, 256), E4M3), abstract((3, 2, 300), jnp.float32), "tile")
    with pytest.raises(ValueError, match=r"\(3, 300, 256\).*\(4, 150, 256\)"):
        grouped.masked_matmul(**right | {"a": fewer})


def test_a_hint_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="expected_rows is 0"):
        grouped.masked_matmul(**operands("masked_matmul"), expected_rows=0)
