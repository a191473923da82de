"""How each tensor is quantised: DeepSeek-V3's FP8 recipe as one table (arXiv 2412.19437, sections 3.3.1 to 3.3.3).

E4M3 everywhere, scales from the tensor itself:

    weights                          blocks of 128 x 128, once per optimizer step
    inputs of a linear layer         tiles of one token x 128 channels
    gradients of its output          tiles of one token x 128 channels for the input gradient, and 128 tokens x one
                                     channel for the weight gradient
    inputs, for the weight gradient  regrouped to 128 tokens x one channel from the E4M3 tiles that the forward pass
                                     kept

Scales are FP32. They are powers of two where V3 says so: around the exchange (the dispatched rows and the gradients
that come back), and for the output of attention. That output is kept in E5M6 (12 bits), because the derivative of
attention reads it too.

Not in FP8: the embedding, the head, the router, norms, the attention core, and the matrix that merges an MTP layer's
two inputs.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from deepseek_jax.config import Execution
from pallas_kernels import GROUP
from pallas_kernels.quantized import Quantized, Scale

DISPATCH: Scale = "pow2"  # of the rows that travel to the experts, and of the gradients that travel to them


@dataclasses.dataclass(frozen=True)
class Input:
    """How a linear layer treats its input.

    Attributes:
        scale: the kind of scale.
        kept: the format in which the input is kept for the weight gradient.
    """

    scale: Scale = "fp32"
    kept: Literal["e4m3", "e5m6"] = "e4m3"


HIDDEN = Input()
ATTENTION_OUTPUT = Input(scale="pow2", kept="e5m6")


def compute_dtype(execution: Execution) -> jnp.dtype:
    """Return the dtype of activations, and of weights that are not multiplied in FP8."""
    return jnp.dtype(jnp.float32 if execution.precision == "fp32" else jnp.bfloat16)


def as_stored(values: jax.Array, scales: jax.Array) -> Quantized:
    """Return blocks [..., in, out], the right operand of the input gradient; zeros pad the columns to whole blocks."""
    missing = -values.shape[-1] % GROUP
    return Quantized(
        jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else values, scales, "block"
    )


def transposed(values: jax.Array, scales: jax.Array) -> Quantized:
    """Return blocks [..., out, in], the right operand of the forward product: the same square blocks, transposed."""
    return Quantized(values.swapaxes(-1, -2), scales.swapaxes(-1, -2), "block")
