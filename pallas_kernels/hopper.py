"""The main loop of every FP8 product on Hopper: D[m, n] = sum over k of A[m, k] B[n, k], scaled every 128 along k.

The problem. Tensor cores multiply E4M3 at twice the rate of BF16 but add in about 14 bits, so after every 128 of k the partial sum leaves
them, is multiplied by the scales of its two groups and added in FP32 by the ordinary units ("promotion", DeepSeek-V3, arXiv 2412.19437,
section 3.3.2). The tensor cores must not wait for that, nor for memory, nor for addresses.

The plan of one thread block, one output tile of 128 x 128 at a time, grid persistent:

    warpgroup 2           copies A, B and the scales of A into a ring of `stages` slots, 128 along k each, ahead of the others
    warpgroups 0 and 1    half of the tile each: wait for a slot, multiply 64 x 128, free the slot, promote

The assembler (ptxas 13.0) begins the next product before it has promoted the last one, on its own account: two products of 64 registers a
thread and the FP32 sum of 64 fit into the 232 there are. What is left to lose is shared memory: products of 64 x 128 read 96 bytes per
cycle and filling the ring writes 64 more, of the 128 that an SM has.

What lost, on an H200, against 1304 TFLOP/s at (4096, 4096, 7168) beside XLA's per-tensor product at 1564 (the reasons are from the
machine code; experiments/log.md has all figures):

    two products per step           a tile of 256 x 128 fills the ring slower (48 bytes a cycle), but its sums need 128 registers. With the
                                    products that the assembler begins early it spills: 915 (*)
    the same, held in order         by a branch never taken that reads the sums: nothing spills, nothing overlaps any more: 825 (*)
    early products in the source    `wgmma_accumulator_load(..., wait_n=1)`: accumulators are zeroed by moves instead of read as zero: 1179
    warpgroups take turns           a barrier around the start of each product: 1213
    five slots instead of four      1243
    asking who I am in the loop     `lax.axis_index("wg")` is a shuffle before each address, which no compiler hoists: 1145

(*) with the shuffle of the last line still in the loop: to be compared with 1145, and not measured without it.

The ring is a Python list of slots: each step's slot is known when the kernel is compiled. A tile begins at slot 0, whatever the number of
steps; slots that the last turn leaves over are passed over by both sides. It is not drained between tiles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import E4M3, GROUP

ROWS = 64  # of one product: wgmma's m
WARPGROUPS = 2  # that multiply
MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232  # per thread; an SM has 65,536
SWIZZLE_BYTES, SWIZZLE_ROWS = 128, 8


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a product is cut.

    Attributes:
        columns: of one product, 64 or 128; its rows are 64.
        split: "m" or "n", the dim along which the two warpgroups share a tile.
        stages: slots of the ring.
        grid_minor: 0 or 1: the dim along which neighbouring blocks' tiles lie.
        grid_width: how many tiles along that dim share their operands in the L2 cache.
    """

    columns: int = 128
    split: str = "m"
    stages: int = 4
    grid_minor: int = 0
    grid_width: int = 8

    @property
    def tile_m(self) -> int:
        """Rows of an output tile."""
        return ROWS * (WARPGROUPS if self.split == "m" else 1)

    @property
    def tile_n(self) -> int:
        """Columns of an output tile."""
        return self.columns * (WARPGROUPS if self.split == "n" else 1)

    def origin(self, wg: Array) -> tuple[Any, Any]:
        """Return the first row and column, within the tile, of what warpgroup `wg` computes."""
        return (wg * ROWS, 0) if self.split == "m" else (0, wg * self.columns)


def scratch(config: TuningConfig, out_dtype: Any) -> list:
    """Return the shared memory and barriers of a kernel: slots of A, B and the scales of A, output, full, empty."""
    return [
        tiled((config.stages, config.tile_m, GROUP), E4M3),
        tiled((config.stages, config.tile_n, GROUP), E4M3),
        plgpu.SMEM((config.stages, config.tile_m), jnp.float32),
        staging(config.columns, out_dtype),
        plgpu.Barrier(num_arrivals=3, num_barriers=config.stages),  # three copies per slot
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=config.stages),
    ]


def tiled(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory in the swizzled layout of TMA and wgmma."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((SWIZZLE_ROWS, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES)))


def staging(width: int, dtype: Any) -> plgpu.SMEM:
    """Where results wait for their way out: columns swizzled, rows as they are, because tiled rows would have to be a multiple of 8."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((columns,)), plgpu.SwizzleTransform(SWIZZLE_BYTES)
    return plgpu.SMEM((WARPGROUPS, ROWS, width), dtype, transforms=transforms)


def over_steps(num_steps: int, stages: int, body: Callable[[Any, int, Any], Any], carry: Any = None) -> Any:
    """Fold `body(first step, number of steps, carry)` over the turns of the ring; the number is static, slots begin at 0 in each turn."""
    turns, rest = divmod(num_steps, stages)
    carry = lax.fori_loop(0, turns, lambda i, carry: body(i * stages, stages, carry), carry)
    return body(turns * stages, rest, carry) if rest else carry


def multiply(config: TuningConfig, num_steps: int, slots: tuple, wg: Array, b_scale: Callable[[Array], Array]) -> Array:
    """Return the sum of warpgroup `wg` over the steps of a tile, FP32 [64, columns].

    Args:
        config: how the tile is cut.
        num_steps: k / 128.
        slots: refs of A, B, scales of A, and the barriers full and empty.
        wg: the warpgroup's number.
        b_scale: step -> the scale of the block of B, a scalar from global memory.
    """
    a_slots, b_slots, a_scale_slots, full, empty = slots
    row, column = config.origin(wg)
    rows, columns = pl.ds(row, ROWS), pl.ds(column, config.columns)

    def turn(first, count, total):
        b_scales = [b_scale(first + slot) for slot in range(count)]  # at once: global memory is far
        for slot in range(count):
            plgpu.barrier_wait(full.at[slot])
            a_scale = plgpu.load(a_scale_slots.at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            product = multiply_slot(a_slots.at[slot, rows], b_slots.at[slot, columns])
            plgpu.barrier_arrive(empty.at[slot])
            total += product * lax.broadcast_in_dim(a_scale * b_scales[slot], product.shape, [0])
        return total

    return over_steps(num_steps, config.stages, turn, zero_sum(config))


def multiply_slot(a: Any, b: Any) -> Array:
    """The FP32 product a b^T of refs [64, 128] and [columns, 128] in shared memory, waited for."""

    def run(product):
        plgpu.wgmma(product, a, b.transpose((1, 0)))
        return product[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))


def zero_sum(config: TuningConfig) -> Array:
    """Return FP32 zeros [64, columns], laid out as a product."""
    return plgpu.layout_cast(jnp.zeros((ROWS, config.columns), jnp.float32), plgpu.Layout.WGMMA)


def copy_step(slots: tuple, slot: int, reused: Array, a: Any, a_scales: Any, b: Any) -> None:
    """Fill one slot with refs [tile_m, 128], [tile_m] and [tile_n, 128], if `reused` once it is free."""
    a_slots, b_slots, a_scale_slots, full, empty = slots

    @pl.when(reused)
    def _():
        plgpu.barrier_wait(empty.at[slot])

    plgpu.copy_gmem_to_smem(a, a_slots.at[slot], full.at[slot])
    plgpu.copy_gmem_to_smem(b, b_slots.at[slot], full.at[slot])
    plgpu.copy_gmem_to_smem(a_scales, a_scale_slots.at[slot], full.at[slot])


def drain(stages: int, num_steps: int, empty: Any) -> None:
    """Wait until every slot that was used is free again: the memory warpgroup's last act."""
    for slot in range(min(stages, num_steps)):
        plgpu.barrier_wait(empty.at[slot])


def store(total: Array, out_slot: Any, send: Callable[[Any], None]) -> None:
    """Send a finished sum out through shared memory: `send(ref)` starts copies of [64, columns], uncommitted."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_slot[...] = total.astype(out_slot.dtype)
    plgpu.commit_smem()
    send(out_slot)
    plgpu.commit_smem_to_gmem_group()


def store_rows(ref: Any, out: Any, first: Array, start: Array, end: Array, columns: Any) -> None:
    """Copy those rows of `ref` [64, n] to the columns of `out` that lie from `start` to `end`; row 0 of `ref` is row `first` of `out`."""
    skip = jnp.clip(start - first, 0, ROWS)
    count = jnp.clip(end - first, 0, ROWS) - skip
    size = ROWS
    while size:  # a rectangle of each size that the binary form of the count has
        part = (count & size) != 0

        @pl.when(part)
        def _(skip=skip, size=size):
            plgpu.copy_smem_to_gmem(ref.at[pl.ds(skip, size)], out.at[pl.ds(first + skip, size), columns], commit_group=False)

        skip += jnp.where(part, size, 0)
        size //= 2


def launch(body: Callable, out_type: Any, num_blocks: int, scratch_types: list) -> Callable:
    """Return the kernel of `body(*refs)` on a persistent grid of `num_blocks`, three warpgroups each."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def by_role(copy: Callable[[], None], compute: Callable[[Array], None]) -> None:
    """Run `copy()` in the memory warpgroup and `compute(wg)` in the others, each with its registers.

    The number of the warpgroup is asked for here and nowhere else: it is a shuffle, which the compiler leaves where it stands.
    """
    wg = lax.axis_index("wg")

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy()

    @pl.when(wg < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute(wg)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def padded_columns(n: int, dtype: Any) -> int:
    """Return n rounded up to whole swizzled lines, of which the copy engine wants a multiple."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return n if n < columns else -(-n // columns) * columns


def whole_tiles(values: Array) -> Array:
    """Pad the rows [..., m, k] to a multiple of the 8 that one swizzle covers: a copy, where m is not one already."""
    missing = -values.shape[-2] % SWIZZLE_ROWS
    return jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, missing), (0, 0)]) if missing else values
