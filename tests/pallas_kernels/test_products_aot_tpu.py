"""The product kernels compile for TPUs on a machine that has none, at DeepSeek-V3's widths and at odd sizes.

Each topology is a process of its own, `python -m tests.pallas_kernels.test_products_aot_tpu TOPOLOGY`: libtpu reads its
environment once. Compiling checks what interpreting can't: tiling, VMEM, and which dtypes the matrix unit takes. It
says nothing about speed.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.grouped import tpu as grouped
from pallas_kernels.grouped import tpu_bf16 as grouped_bf16
from pallas_kernels.matmul import tpu as matmul
from pallas_kernels.quantized import E4M3, Quantized, scales_shape
from tests.support.tpu import compile_elsewhere

MATRIX_UNITS = {"v5p:2x2x1": "bfloat16", "v6e:2x2x1": "bfloat16", "tpu7x:2x2x1": "float8_e4m3fn"}
SIZES = {"odd": (37, 150, 384), "expert": (4096, 4096, 7168), "attention": (4097, 576, 1536)}  # m, n, k
BF16_SIZES = SIZES | {"odd": (37, 150, 300)}  # BF16 takes any k
NUM_GROUPS = 4


def fp8_programs(array: Callable, m: int, n: int, k: int) -> Iterator[tuple[str, Callable, tuple]]:
    """Every FP8 product at one size: its name, the kernel, and abstract operands; `array` makes one of a shape and
    dtype.
    """

    def quantized(shape, grouping):
        return Quantized(array(shape, E4M3), array(scales_shape(shape, grouping), jnp.float32), grouping)

    sizes, c, cs = array((NUM_GROUPS,), jnp.int32), array((m, n), jnp.float32), array((NUM_GROUPS, m, n), jnp.float32)
    left, right = quantized((m, k), "tile"), quantized((n, k), "tile")
    block, blocks = quantized((n, k), "block"), quantized((NUM_GROUPS, n, k), "block")
    yield "matmul", matmul.matmul, (left, block)
    yield "matmul_accumulate", matmul.matmul_accumulate, (left, right, c)
    yield "matmul_accumulate, no c", matmul.matmul_accumulate, (left, right)
    yield "grouped_matmul", grouped.grouped_matmul, (left, blocks, sizes)
    yield "masked_matmul", grouped.masked_matmul, (quantized((NUM_GROUPS, m, k), "tile"), blocks, sizes)
    yield "grouped_matmul_accumulate", grouped.grouped_matmul_accumulate, (left, right, sizes, cs)
    yield "grouped_matmul_accumulate, no c", grouped.grouped_matmul_accumulate, (left, right, sizes)


def bf16_programs(array: Callable, m: int, n: int, k: int) -> Iterator[tuple[str, Callable, tuple]]:
    """Every BF16 product at one size, like `fp8_programs`."""

    def bf16(*shape):
        return array(shape, jnp.bfloat16)

    sizes, cs = array((NUM_GROUPS,), jnp.int32), array((NUM_GROUPS, m, n), jnp.float32)
    transposed = functools.partial(grouped_bf16.grouped_matmul_bf16, transpose_b=True)
    yield "grouped_matmul_bf16", grouped_bf16.grouped_matmul_bf16, (bf16(m, k), bf16(NUM_GROUPS, n, k), sizes)
    yield "grouped_matmul_bf16, b transposed", transposed, (bf16(m, k), bf16(NUM_GROUPS, k, n), sizes)
    accumulate = grouped_bf16.grouped_matmul_accumulate_bf16
    yield "grouped_matmul_accumulate_bf16", accumulate, (bf16(k, m), bf16(k, n), sizes, cs)
    yield "grouped_matmul_accumulate_bf16, no c", accumulate, (bf16(k, m), bf16(k, n), sizes)


def compile_all(topology: str) -> dict:
    """Compile every product at every size for one device; return the kernels in each program and what the matrix unit
    multiplies.
    """
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = Mesh(np.array([device]), "x")
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    kernels = {}
    with jax.set_mesh(mesh):
        for size in SIZES:
            for name, kernel, operands in (
                *fp8_programs(array, *SIZES[size]),
                *bf16_programs(array, *BF16_SIZES[size]),
            ):
                text = jax.jit(kernel).lower(*operands).compile().as_text()
                kernels[f"{name}: {size}"] = text.count('custom_call_target="tpu_custom_call"')
        return {"kernels": kernels, "matrix_unit": str(matmul.matrix_unit_dtype())}


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("topology", MATRIX_UNITS)
def test_products_compile_for_tpu(topology):
    result = json.loads(compile_elsewhere(__file__, topology).splitlines()[-1])
    assert set(result["kernels"].values()) == {1}, result["kernels"]
    assert result["matrix_unit"] == MATRIX_UNITS[topology]


if __name__ == "__main__":
    print(json.dumps(compile_all(*sys.argv[1:])))
