"""The producers' TPU kernels compile for real TPUs at V3's shapes, on a machine that has none. `tests.test_aot_tpu`
tells how.
"""

import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import producers
from tests.support.tpu import compile_elsewhere, structs_on

TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1")
ROWS, WIDTH, HIDDEN = 300, 7168, 2048  # odd rows; an expert's widths


def compile_all(topology: str) -> None:
    """Compile every producer for a device of `topology`."""
    struct = structs_on(topology)
    x, gain = struct((ROWS, WIDTH), jnp.bfloat16), struct((WIDTH,), jnp.float32)
    hidden, grad = struct((ROWS, 2 * HIDDEN), jnp.bfloat16), struct((ROWS, HIDDEN), jnp.bfloat16)
    weight = struct((ROWS,), jnp.float32)
    packed, scales = struct((ROWS, WIDTH * 3 // 2), jnp.uint8), struct((WIDTH // 128, ROWS), jnp.float32)
    on_tpu = {"implementation": "tpu"}
    for f, inputs in (
        (lambda x, gain: producers.rms_norm_quantize(x, gain, 1e-6, **on_tpu), (x, gain)),
        (lambda h, w: producers.swiglu_quantize(h, w, **on_tpu), (hidden, weight)),
        (lambda h, g, w: producers.swiglu_backward_quantize(h, g, w, **on_tpu), (hidden, grad, weight)),
        (lambda x: producers.e5m6_pack(x, **on_tpu), (x,)),
        (lambda p, s: producers.e5m6_unpack(p, s, m=ROWS, **on_tpu), (packed, scales)),
    ):
        assert "tpu_custom_call" in jax.jit(f).trace(*inputs).lower().compile().as_text()


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_producers_compile_for_tpu(topology):
    compile_elsewhere(__file__, topology)


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
