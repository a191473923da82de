"""The slots through which weights stream (`hopper_stream.py`): how large they are, how many fit, how work is cut."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.ring import tiled
from pallas_kernels.quantized import E4M3

ROWS, BLOCKS = 64, 2  # of wgmma; of a slot
STEP_BYTES = 128  # of k
SCALES_UNIT = 32  # FP32 numbers in the 128 bytes at which a copy may begin
MOST_STAGES = 24  # barriers of a ring


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
        width: columns of a block of gate and of up, 64 or 128; in FP8 128, a group of the activations.
        down_width: columns of a block of down, 64 or 128.
        ring_bytes: of shared memory, for the slots.
        turned: whether tiles of columns begin in different places along k, in FP8.
        interpreted: whether products are `jnp.dot`, as the interpreter wants them.
    """

    width: int = 64
    down_width: int = 64
    ring_bytes: int = 208 * 1024
    turned: bool = False
    interpreted: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static facts of a stream.

    Attributes:
        in_fp8: whether operands are E4M3 with scales.
        rows: N.
        width: of a block.
        k: numbers that a product sums.
        turned: whether tiles begin in different places along k, in FP8.
    """

    in_fp8: bool
    rows: int
    width: int
    k: int
    turned: bool = False

    @property
    def depth(self) -> int:
        """Numbers along k in a step."""
        return GROUP if self.in_fp8 else GROUP // 2

    @property
    def steps(self) -> int:
        """Steps of a visit."""
        return self.k // self.depth

    def turn(self, tile: Any, tiles: int) -> Any:
        """Return the step with which a tile of columns begins.

        In FP8 a row of weights is a column of the product, and 128 bytes of it a step. Multiprocessors in step with
        each other would all read the same places of rows, perhaps from a few of the channels of memory.
        """
        return lax.div(tile * self.steps, jnp.int32(tiles)) if self.in_fp8 and self.turned else 0

    @property
    def tiles(self) -> int:
        """Sums of a block."""
        return self.width // ROWS

    def scratch(self, ring_bytes: int) -> list:
        """Return the ring and its barriers."""
        block = (self.width, self.depth) if self.in_fp8 else (self.depth, self.width)
        dtype = E4M3 if self.in_fp8 else jnp.bfloat16
        slot = (BLOCKS * self.width + self.rows) * STEP_BYTES + 512 * self.in_fp8
        stages = min(ring_bytes // slot, MOST_STAGES)
        copies = BLOCKS + 1 + self.in_fp8
        padded = -(-self.rows // SCALES_UNIT) * SCALES_UNIT
        scales = [plgpu.SMEM((stages, padded), jnp.float32)] if self.in_fp8 else []
        return [
            tiled((stages, BLOCKS, *block), dtype),
            tiled((stages, self.rows, self.depth), dtype),
            *scales,
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ]
