"""How each tensor is quantised: DeepSeek-V3's FP8 recipe as one table (arXiv 2412.19437, sections 3.3.1 to 3.3.3).

E4M3 everywhere, scales from the tensor itself:

    weights                          blocks of 128 x 128, once per optimizer step
    inputs of a linear layer         tiles of one token x 128 channels
    gradients of its output          tiles of one token x 128 channels for the input gradient, and 128 tokens x one
                                     channel for the weight gradient
    inputs, for the weight gradient  regrouped to 128 tokens x one channel from the E4M3 tiles that the forward pass
                                     kept

Scales are FP32. They are powers of two where V3 says so: around the exchange (the dispatched rows and the gradients
that come back), and for the output of attention.

That output O is kept in E5M6, 12 bits instead of 16, and once (section 3.3.3): the weight gradient of the output
projection reads it, and so does the derivative of the attention core. The core needs O only in its sums delta over
channels of dO O, one per token and head. Both read the same E5M6 numbers, off by at most 2^-7 of a value, where BF16's
are off by 2^-8: the gradients of queries and keys have errors of 0.55% instead of 0.30%, beside some 4% of an FP8
product (tests/model/test_flash.py). The exact alternatives keep O in BF16, a third more memory, or run the core's
forward pass again.

Not in FP8: the embedding, the head, the router, norms, the attention core, and the matrix that merges an MTP layer's
two inputs.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Execution
from pallas_kernels import GROUP
from pallas_kernels.producers import e5m6_pack, e5m6_unpack
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


class Packed(NamedTuple):
    """Rows in E5M6, as `pallas_kernels.producers.e5m6_pack` makes them."""

    values: jax.Array  # uint8 [T, columns * 3 / 2]
    scales: jax.Array

    @classmethod
    def of(cls, x: jax.Array, dims: int) -> "Packed":
        """Pack BF16 [*tokens, *columns], whose first `dims` dims are tokens."""
        return cls(*e5m6_pack(x.reshape(math.prod(x.shape[:dims]), -1)))

    def unpack(self, shape: tuple[int, ...]) -> jax.Array:
        """Return BF16 of `shape`, exactly what was packed."""
        return e5m6_unpack(*self, m=self.values.shape[0]).reshape(shape)


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
