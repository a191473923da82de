"""Marks in memory, by which a thread block on Hopper tells others of the same kernel that what it wrote is there.

A mark is an int32 that is 0 when the kernel starts and 1 once it is set. Zeros come from a kernel that runs before
(`write_zeros`): of zeros that XLA makes there is one array, and every kernel but the last gets a copy, 1.2 us each. A
block should wait only for blocks with a lower number, which start before it: then it cannot wait in vain, wherever and
whenever they run. The interpreter runs them one after the other and knows no PTX: it goes without marks.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

UNTYPED: Any = plgpu  # the type checker does not see what its decorators return
MARKS = 256  # of an array; more than any GPU has multiprocessors
MOST_TOGETHER = 128  # threads of a warpgroup, each of which waits for one


def write_zeros(ref: Any) -> None:
    """Write zeros for the marks of a kernel that follows; `ref` int32 [a multiple of 128]."""
    ref[...] = plgpu.layout_cast(jnp.zeros(ref.shape, jnp.int32), plgpu.Layout.WG_STRIDED(ref.shape, vec_size=1))


def set_mark(ref: Any) -> None:
    """Set a mark, int32 [1], behind all that this warpgroup has written before."""

    @UNTYPED.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_, ref):
        utils.warpgroup_barrier()
        one_thread = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        _asm("fence.acq_rel.gpu; @$1 st.release.gpu.global.b32 [$0], 1;", [_address(ref), one_thread], "l,b")

    emit(ref)


def wait_for_marks(ref: Any) -> None:
    """Wait until all marks of int32 [at most 128] are set, and see what was written before each."""
    count = ref.shape[0]
    assert count <= MOST_TOGETHER, count
    lines = ["{ .reg .pred missing, mine; .reg .b32 found, lane; .reg .b64 place;"]
    lines += ["mov.u32 lane, %tid.x;", "and.b32 lane, lane, 127;", f"setp.lt.u32 mine, lane, {count};"]
    lines += ["mad.wide.u32 place, lane, 4, $0;", "AGAIN: mov.b32 found, 1;"]
    lines += [
        "@mine ld.acquire.gpu.global.b32 found, [place];",
        "setp.eq.b32 missing, found, 0;",
        "@missing bra AGAIN; }",
    ]

    @UNTYPED.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_, ref):
        _asm("\n".join(lines), [_address(ref)], "l")
        utils.warpgroup_barrier()

    emit(ref)


def _asm(ptx: str, operands: list[ir.Value], constraints: str) -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, ptx, f"{constraints},~{{memory}}", has_side_effects=True, asm_dialect=0)


def _address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))
