"""One FP8 product of a warpgroup on Hopper, started and finished in PTX.

`plgpu.wgmma` does this too. What it cannot say is what becomes of the accumulator: it is made zero by instructions, and
the assembler gives every product registers of its own, so that it can begin the next one early. Next to 128 registers
of sums, two products do not fit: they spill. Here, all products of a warpgroup share one accumulator. The first wgmma
does not add to it, but the assembler cannot know: it is told by a predicate that only the run shows to be false. So it
keeps the registers, and waits until the last product has been promoted. The tensor cores are busy with the other
warpgroup meanwhile.

GPU interpreters know no PTX: with `ptx=False` a product is that of `plgpu.wgmma`.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

ROWS, DEPTH = 64, 128  # of a product: wgmma's m, and one swizzled line of FP8
INSTRUCTION_DEPTH = 32  # of one wgmma

OPERAND = plgpu.RefType((plgpu.TilingTransform((DEPTH,)), plgpu.SwizzleTransform(DEPTH)))  # rows of 128 bytes
# upper half of an operand's descriptor: swizzle of 128 bytes, 1024 bytes from 8 rows to the next (PTX ISA)
DESCRIPTOR = 0x40000040


def never(wg: Array) -> Array:
    """Return int32 0, computed from the number of a warpgroup so that no compiler can tell."""
    zero = lax.shift_right_logical(lax.optimization_barrier(wg), jnp.int32(8))
    return plgpu.layout_cast(jnp.broadcast_to(zero, ()), plgpu.Layout.WG_SPLAT)


def start(a, b, product: Array, add: Array, *, ptx: bool = True) -> Array:
    """Return the FP32 product a b^T of refs [64, 128] and [columns, 128], in the registers of `product`.

    `finish` it before reading it.

    Args:
        a: E4M3 in swizzled shared memory.
        b: E4M3 in swizzled shared memory; 64 or 128 columns.
        product: FP32 [64, columns], laid out for wgmma.
        add: int32, `never(wg)`: if not 0, the product would be added to `product`.
        ptx: whether to emit PTX; without, the product is finished at once.
    """
    if not ptx:
        return _interpretable(a, b)
    registers = b.shape[0] // 2
    accumulator = "{" + ", ".join(f"${i}" for i in range(registers)) + "}"
    a_address, b_address, add_flag = (f"${registers * 2 + i}" for i in range(3))
    lines = ["{ .reg .pred add, always;  .reg .b64 a, b;  .reg .b32 low;", "wgmma.fence.sync.aligned;"]
    lines += [f"setp.ne.b32 add, {add_flag}, 0;", "setp.ne.b32 always, 1, 0;"]
    for descriptor, address in (("a", a_address), ("b", b_address)):
        lines += [
            f"shr.u32 low, {address}, 4;",
            "and.b32 low, low, 0x3fff;",
            f"mov.b64 {descriptor}, {{low, {DESCRIPTOR}}};",
        ]
    for depth in range(0, DEPTH, INSTRUCTION_DEPTH):
        kind, predicate = f"m{ROWS}n{b.shape[0]}k{INSTRUCTION_DEPTH}.f32.e4m3.e4m3", "always" if depth else "add"
        lines.append(f"wgmma.mma_async.sync.aligned.{kind} {accumulator}, a, b, {predicate}, 1, 1;")
        lines += [f"add.s64 {descriptor}, {descriptor}, {INSTRUCTION_DEPTH // 16};" for descriptor in ("a", "b")]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]

    @plgpu.inline_mgpu(
        arg_types=(OPERAND, OPERAND, plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT), return_type=_accumulator(product)
    )
    def emit(_, a, b, product, add):
        return _emit("\n".join(lines), product, [_address(a), _address(b), add.registers.item()])

    return emit(a, b, product, add)


def finish(product: Array, *, ptx: bool = True) -> Array:
    """Wait for the product that was started last and return it."""
    if not ptx:
        return product

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_accumulator(product))
    def emit(_, product):
        return _emit("wgmma.wait_group.sync.aligned 0;", product, [])

    return emit(product)


def _accumulator(product: Array) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=plgpu.Layout.WGMMA)


def _address(ref: ir.Value) -> ir.Value:
    """The address in shared memory, 32 bits."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _emit(ptx: str, product: fa.FragmentedArray, inputs: list[ir.Value]) -> fa.FragmentedArray:
    """Insert PTX that changes the registers of `product` and reads 32-bit `inputs`.

    The registers are $0 and on; as inputs they are counted once more.
    """
    product = product.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
    registers = list(product.registers.flat)
    constraints = ["=f"] * len(registers) + [str(i) for i in range(len(registers))] + ["r"] * len(inputs)
    kind = registers[0].type
    results = llvm.inline_asm(
        llvm.StructType.get_literal([kind] * len(registers)),
        [*registers, *inputs],
        ptx,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    new = np.empty(len(registers), object)
    new[:] = [llvm.extractvalue(kind, results, [i]) for i in range(len(registers))]
    new = fa.FragmentedArray(_registers=new.reshape(product.registers.shape), _layout=product.layout, _is_signed=None)
    return new.to_layout(fa.WGMMA_LAYOUT)


def _interpretable(a, b) -> Array:
    def run(product):
        plgpu.wgmma(product, a, b.transpose((1, 0)))
        return product[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))
