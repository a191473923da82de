"""The quantisers' TPU kernels compile for real TPUs at V3's widths, on a machine that has none. `tests.test_aot_tpu`
tells how.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import quantize
from pallas_kernels.quantized import E4M3, Quantized
from tests.support.tpu import compile_elsewhere, structs_on

TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1")
ROWS, WIDTH = 301, 7168  # odd rows
LATENT = 576  # of V3's keys and values: a partial block


def compile_all(topology: str) -> None:
    """Compile every quantiser for a device of `topology`."""
    struct = structs_on(topology)
    x, rows = struct((ROWS, WIDTH), jnp.bfloat16), struct((50,), jnp.int32)
    q = Quantized(struct((ROWS, WIDTH), E4M3), struct((WIDTH // 128, ROWS + 3), jnp.float32), "tile")
    for operation, inputs in (
        (quantize.quantize_tiles, (x,)),
        (quantize.quantize_tiles_both, (x,)),
        (quantize.requantize_transposed, (q,)),
        (quantize.quantize_rows, (x, rows)),
        (quantize.quantize_blocks, (struct((LATENT, WIDTH), jnp.float32),)),
        (quantize.quantize_blocks, (struct((2, WIDTH, LATENT), jnp.float32),)),
    ):
        program = jax.jit(functools.partial(operation, implementation="tpu"))
        assert "tpu_custom_call" in program.trace(*inputs).lower().compile().as_text()


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_quantisers_compile_for_tpu(topology):
    compile_elsewhere(__file__, topology)


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
