"""The thread block of a product on Hopper: a ring of slots, one warpgroup that fills it, two that multiply."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowering import layout_inference, manual_axes

WARPGROUPS = 2  # that multiply
# per thread; together the 168 for each of 384 threads that a block starts with
MEMORY_REGISTERS, COMPUTE_REGISTERS = 24, 240
SWIZZLE_BYTES, SWIZZLE_ROWS = 128, 8


@dataclasses.dataclass(frozen=True)
class Ring:
    """The slots through which operands pass.

    Attributes:
        operands: refs [stages, ...] of A, B, the scales of A, and what else a step needs.
        full: barriers, one per slot: its copies have arrived.
        empty: barriers, one per slot: both warpgroups are done with it.
    """

    operands: Sequence[Any]
    full: Any
    empty: Any

    @property
    def stages(self) -> int:
        """The number of slots."""
        return self.operands[0].shape[0]

    def after(self, slot: Array) -> Array:
        """Return the slot that follows."""
        return jnp.where(slot == self.stages - 1, 0, slot + 1)

    def fill(self, slot: Array, sources: Sequence[Any]) -> Array:
        """Copy one step into a slot, once it is free; return the next slot."""
        plgpu.barrier_wait(self.empty.at[slot])
        for source, operand in zip(sources, self.operands, strict=True):
            plgpu.copy_gmem_to_smem(source, operand.at[slot], self.full.at[slot])
        return self.after(slot)

    def drain(self) -> None:
        """Wait until every slot is free again: the memory warpgroup's last act."""
        for slot in range(self.stages):
            plgpu.barrier_wait(self.empty.at[slot])


def barriers(copies: int, stages: int) -> list:
    """Return the barriers of a ring, full and empty, for a number of copies per slot."""
    arrivals = copies, WARPGROUPS
    return [plgpu.Barrier(num_arrivals=count, num_barriers=stages) for count in arrivals]


def tiled(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory in the swizzled layout of TMA and wgmma."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((SWIZZLE_ROWS, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    )


def swizzled(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory in rows of 128 bytes, with the bytes of `tiled`.

    The matrix in global memory may have any number of rows.
    """
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform(shape[-1:]), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    )


def over_steps(num_steps: Any, unroll: int, body: Callable[[Any, int, Any], Any], carry: Any = None) -> Any:
    """Fold `body(first step, number of steps, carry)` over `num_steps`: `unroll` of them at a time, then the rest.

    `num_steps` is a number or a scalar.
    """
    if isinstance(num_steps, int):
        rounds, rest = divmod(num_steps, unroll)
        carry = lax.fori_loop(0, rounds, lambda i, carry: body(i * unroll, unroll, carry), carry)
        return body(rounds * unroll, rest, carry) if rest else carry
    rounds = lax.div(num_steps, jnp.int32(unroll))
    carry = lax.fori_loop(0, rounds, lambda i, carry: body(i * unroll, unroll, carry), carry)
    return lax.fori_loop(rounds * unroll, num_steps, lambda i, carry: body(i, 1, carry), carry)


def launch(body: Callable, out_type: Any, num_blocks: int, scratch_types: list, **params: Any) -> Callable:
    """Return the kernel of `body(*refs)` on a persistent grid of `num_blocks`, three warpgroups each.

    `params` are more of `plgpu.CompilerParams`.
    """
    layout_inference.install()
    return plgpu.kernel(
        body,
        kernel_name=manual_axes.operation(body),
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, **params),
    )


def by_role(ring: Ring, copy: Callable[[], None], compute: Callable[[Array], None]) -> None:
    """Run `copy()` in the memory warpgroup and `compute(wg)` in the others, each with its registers.

    All slots begin free and end free.

    The number of the warpgroup is asked for here and nowhere else: it is a shuffle, which the compiler leaves where it
    stands.
    """
    wg = lax.axis_index("wg")

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy()
        ring.drain()

    @pl.when(wg < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for slot in range(ring.stages):
            plgpu.barrier_arrive(ring.empty.at[slot])
        compute(wg)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
