"""The main loop of every FP8 product on Hopper: D[m, n] = sum over k of A[m, k] B[n, k], scaled every 128 along k.

The problem. Tensor cores multiply E4M3 at twice the rate of BF16 but add in about 14 bits, so after every 128 of k the partial sum leaves
them, is multiplied by the scales of its two groups and added in FP32 by the ordinary units ("promotion", DeepSeek-V3, arXiv 2412.19437,
section 3.3.2). While one warpgroup promotes, the other must multiply, and neither may wait for memory.

The plan of one thread block, one output tile at a time, grid persistent:

    warpgroup 2           copies A, B and the scales of A into a ring of `stages` slots, 128 along k each, ahead of the others
    warpgroups 0 and 1    each half of the tile's rows: wait for a slot, multiply, free it, promote

A warpgroup's part of a tile is `waves_m x waves_n` products of 64 x 128, one after the other, so that one wait, one load of scales and
one turn of the ring serve several products. Registers set the limit: the FP32 sums take 64 of the 232 per thread and wave, the product
in flight 64 more. What binds next is shared memory: an SM reads 96 bytes per cycle for products of 64 x 128 and the ring is filled with
4096 (1 / rows + 1 / columns) more, of 128. Two waves therefore also save copies: 48 bytes for 256 x 128 against 64 for 128 x 128.

The ring is a Python list of slots: each step's slot is known when the kernel is compiled. A tile begins at slot 0, whatever the number of
steps; slots that the last turn leaves over are passed over by both sides. It is not drained between tiles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
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
        waves_m: products per warpgroup and step, along m.
        waves_n: the same along n.
        columns: of one product, 64 or 128; its rows are 64.
        split: "m" or "n", the dim along which the two warpgroups share a tile.
        stages: slots of the ring.
        grid_minor: 0 or 1: the dim along which neighbouring blocks' tiles lie.
        grid_width: how many tiles along that dim share their operands in the L2 cache.
        out_slots: finished products of a warpgroup that wait in shared memory for their way out.
    """

    waves_m: int = 1
    waves_n: int = 2
    columns: int = 128
    split: str = "m"
    stages: int = 3
    grid_minor: int = 0
    grid_width: int = 8
    out_slots: int = 2

    @property
    def tile_m(self) -> int:
        """Rows of an output tile."""
        return ROWS * self.waves_m * (WARPGROUPS if self.split == "m" else 1)

    @property
    def tile_n(self) -> int:
        """Columns of an output tile."""
        return self.columns * self.waves_n * (WARPGROUPS if self.split == "n" else 1)

    @property
    def waves(self) -> list[tuple[int, int]]:
        """Positions of a warpgroup's products in its part of the tile, in the order in which they are made."""
        return [(i, j) for i in range(self.waves_m) for j in range(self.waves_n)]

    def origin(self, i: int, j: int) -> tuple[Any, Any]:
        """Return the first row and column, within the tile, of product (i, j) of the warpgroup that asks."""
        wg = lax.axis_index("wg")
        row, column = (wg, 0) if self.split == "m" else (0, wg)
        return (row * self.waves_m + i) * ROWS, (column * self.waves_n + j) * self.columns


def scratch(config: TuningConfig, out_dtype: Any) -> list:
    """Return the shared memory and barriers of a kernel: the slots of A, B, scales of A, outputs; then full and empty."""
    return [
        tiled((config.stages, config.tile_m, GROUP), E4M3),
        tiled((config.stages, config.tile_n, GROUP), E4M3),
        plgpu.SMEM((config.stages, config.tile_m), jnp.float32),
        staging((WARPGROUPS, min(config.out_slots, len(config.waves)), ROWS, config.columns), out_dtype),
        plgpu.Barrier(num_arrivals=3, num_barriers=config.stages),  # three copies per slot
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=config.stages),
    ]


def tiled(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory in the swizzled layout of TMA and wgmma."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((SWIZZLE_ROWS, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES)))


def staging(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory on the way out: columns swizzled, rows as they are, because tiled rows would have to be a multiple of 8."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((columns,)), plgpu.SwizzleTransform(SWIZZLE_BYTES)))


def over_steps(num_steps: int | Array, stages: int, body: Callable, carry: Any = None) -> Any:
    """Fold `body(step, slot, carry)` over the steps of a tile; `slot` is a Python int. `num_steps` is static."""
    turns, rest = divmod(num_steps, stages)

    def turn(i, carry):
        for slot in range(stages):
            carry = body(i * stages + slot, slot, carry)
        return carry

    carry = lax.fori_loop(0, turns, turn, carry)
    for slot in range(rest):
        carry = body(turns * stages + slot, slot, carry)
    return carry


def multiply(config: TuningConfig, num_steps: int, slots: tuple, b_scale: Callable[[Array, Array], Array], parking: Any) -> dict:
    """Return this warpgroup's sums, {wave: FP32 [64, columns]}.

    Args:
        config: how the tile is cut.
        num_steps: k / 128.
        slots: refs of A, B, scales of A, and the barriers full and empty.
        b_scale: (column within the tile, step) -> the scale of its block of B, a scalar from global memory.
        parking: shared memory [64, columns] of this warpgroup, see `_settle`.
    """
    a_slots, b_slots, a_scale_slots, full, empty = slots

    def body(step, slot, carry):
        sums, scales = dict(carry[0]), carry[1]
        if slot == 0:  # for a whole turn of the ring: global memory is far
            turn = [jnp.minimum(step + s, num_steps - 1) for s in range(config.stages)]
            scales = [[b_scale(config.origin(0, j)[1], s) for j in range(config.waves_n)] for s in turn]
        plgpu.barrier_wait(full.at[slot])
        rows = [pl.ds(config.origin(i, 0)[0], ROWS) for i in range(config.waves_m)]
        a_scales = [plgpu.load(a_scale_slots.at[slot, r], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) for r in rows]
        for i, j in config.waves:
            columns = pl.ds(config.origin(0, j)[1], config.columns)
            product = multiply_slot(a_slots.at[slot, rows[i]], b_slots.at[slot, columns].transpose((1, 0)))
            if (i, j) == config.waves[-1]:
                plgpu.barrier_arrive(empty.at[slot])
            sums[i, j] += product * lax.broadcast_in_dim(a_scales[i] * scales[slot][j], product.shape, [0])
            if len(config.waves) > 1:
                _settle(sums[i, j], scales[slot][j], parking)
        return sums, scales

    no_scales = [[jnp.float32(0.0)] * config.waves_n] * config.stages
    return over_steps(num_steps, config.stages, body, (zero_sums(config), no_scales))[0]


def zero_sums(config: TuningConfig) -> dict[tuple[int, int], Array]:
    """Return the sums of `multiply` before its first step."""
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, config.columns), jnp.float32), plgpu.Layout.WGMMA)
    return dict.fromkeys(config.waves, zeros)


def multiply_slot(a: Any, b: Any) -> Array:
    """The FP32 product of refs [64, 128] and [128, n] in shared memory, waited for."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _settle(total: Array, scale: Array, parking: Any) -> None:
    """Have `total` computed before the next product begins.

    The assembler (ptxas 13.0) likes to promote one product while the next one runs, which needs registers for both. Two waves do not have
    them: it spilled 300 registers and the kernel ran at half its speed. A branch that reads `total` and is never taken, because scales are
    not negative, holds it back; the other warpgroup's products fill the gap.
    """

    @pl.when(scale < 0.0)
    def _():
        parking[...] = total.astype(parking.dtype)


def drain(config: TuningConfig, num_steps: int, empty) -> None:
    """Wait until every slot that was used is free again: the memory warpgroup's last act."""
    for slot in range(min(config.stages, num_steps)):
        plgpu.barrier_wait(empty.at[slot])


def copy_step(slots: tuple, slot: int, reused: Array, a, a_scales, b) -> None:
    """Fill one slot with refs [tile_m, 128], [tile_m] and [tile_n, 128], if `reused` once it is free."""
    a_slots, b_slots, a_scale_slots, full, empty = slots

    @pl.when(reused)
    def _():
        plgpu.barrier_wait(empty.at[slot])

    plgpu.copy_gmem_to_smem(a, a_slots.at[slot], full.at[slot])
    plgpu.copy_gmem_to_smem(b, b_slots.at[slot], full.at[slot])
    plgpu.copy_gmem_to_smem(a_scales, a_scale_slots.at[slot], full.at[slot])


def store_waves(config: TuningConfig, sums: dict[tuple[int, int], Array], out_slots: Any, send: Callable) -> None:
    """Send each product out through shared memory: `send(ref, i, j)` starts copies of [64, columns] of wave (i, j), uncommitted."""
    wg, num_slots = lax.axis_index("wg"), min(config.out_slots, len(config.waves))
    for turn, ((i, j), total) in enumerate(sums.items()):
        slot = turn % num_slots
        # One group of copies per product: all but the youngest `num_slots - 1` have been read when this slot's last one has.
        plgpu.wait_smem_to_gmem(num_slots - 1, wait_read_only=True)
        out_slots[wg, slot] = total.astype(out_slots.dtype)
        plgpu.commit_smem()
        send(out_slots.at[wg, slot], i, j)
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


def by_role(copy: Callable[[], None], compute: Callable[[], None]) -> None:
    """Run `copy` in the memory warpgroup and `compute` in the others, each with its registers."""

    @pl.when(lax.axis_index("wg") == WARPGROUPS)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy()

    @pl.when(lax.axis_index("wg") < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def padded_columns(n: int, dtype: Any) -> int:
    """Return n rounded up to whole swizzled lines, of which the copy engine wants a multiple."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return n if n < columns else -(-n // columns) * columns


def whole_tiles(values: Array) -> Array:
    """Pad the rows [..., m, k] to a multiple of the 8 that one swizzle covers: a copy, where m is not one already."""
    missing = -values.shape[-2] % SWIZZLE_ROWS
    return jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, missing), (0, 0)]) if missing else values


def shape_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A ShapeDtypeStruct, for `launch`."""
    return jax.ShapeDtypeStruct(shape, dtype)
