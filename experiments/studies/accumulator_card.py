"""Find out how a Hopper card adds FP8 products: `python -m experiments.studies.accumulator_card`.

Four programs of the card and the emulator (`pallas_kernels/accumulator.py`), with several parameters, multiply the same
FP8 values; every scale is 1. Prints the relative L2 error of each against the exact product, and the distance from each
program to each emulated product. The parameters at distance 0 are the card's. Needs an NVIDIA GPU of the Hopper
generation. Takes two minutes, most of them for the emulator.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.inputs import new_file
from experiments import command
from pallas_kernels import GROUP, matmul
from pallas_kernels.accumulator import ROUNDINGS, Accumulator, multiply
from pallas_kernels.bench import records
from pallas_kernels.hopper.ring import tiled
from pallas_kernels.quantized import E4M3, LARGEST, Quantized, scales_shape

JSON = flags.DEFINE_string("json", None, "Write the records to this file.")

SIZE = 128  # m and n: one tile of the kernel
LENGTHS = (4096, 16384)  # of K
DISTRIBUTIONS = {"N(0, 1)": "standard_normal", "uniform(0, 1)": "random"}  # names and methods of numpy.random.Generator
EMULATED = [
    Accumulator(bits, rounding, interval) for interval in (None, GROUP) for bits in (13, 14) for rounding in ROUNDINGS
]


def main(_) -> None:
    """Multiply, compare, report."""
    json = command.path_of(JSON, new_file)
    if jax.devices()[0].platform != "gpu":
        raise NotImplementedError(
            f"this study needs a Hopper GPU, and {jax.devices()[0].device_kind} accumulates in FP32; run it on one"
        )
    found = []
    for name, method in DISTRIBUTIONS.items():
        for k in LENGTHS:
            a, b = draw(method, k)
            print(f"\n{name}, K = {k}: relative L2, %")
            found += compare(name, a, b, PROGRAMS)
    common = records.provenance("experiments.studies.accumulator_card", f"1 x {jax.devices()[0].device_kind}")
    if json:
        records.write(json, [record | common for record in found])


def draw(method: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random E4M3 matrices a and b [128, k] with their largest magnitudes at 448."""
    rng = np.random.default_rng(k)
    a, b = (getattr(rng, method)((SIZE, k)) for _ in range(2))
    return tuple((x * (LARGEST / abs(x).max())).astype(ml_dtypes.float8_e4m3fn) for x in (a, b))


def compare(name: str, a: np.ndarray, b: np.ndarray, programs: dict[str, Callable]) -> list[dict[str, Any]]:
    """Print the error of every program and its distance to every emulated product; return records of the errors."""
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    products = {label: np.asarray(program(a, b), np.float64) for label, program in programs.items()}
    emulated = {_label(accumulator): multiply(a, b, accumulator).astype(np.float64) for accumulator in EMULATED}
    print(f"{'':52}{'error':>8}" + "".join(f"{'to ' + label:>31}" for label in products))
    for label, product in products.items():
        print(f"{label:52}{relative(product, exact):8.4f}")
    for label, product in emulated.items():
        distances = "".join(f"{relative(x, product):31.4f}" for x in products.values())
        print(f"{label:52}{relative(product, exact):8.4f}{distances}")
    shape = {"m": a.shape[0], "n": b.shape[0], "k": a.shape[1]}
    return [
        _record(name, label, shape, relative(product, exact), *_nearest(product, emulated, exact))
        for label, product in products.items()
    ]


def relative(product: np.ndarray, exact: np.ndarray) -> float:
    """Return |product - exact| / |exact| in percent."""
    return float(100 * np.linalg.norm(product - exact) / np.linalg.norm(exact))


def _nearest(product: np.ndarray, emulated: dict[str, np.ndarray], exact: np.ndarray) -> tuple[str, float]:
    """Return the label and the error of the nearest emulated product."""
    label = min(emulated, key=lambda label: relative(product, emulated[label]))
    return label, relative(emulated[label], exact)


def _label(accumulator: Accumulator) -> str:
    promoted = (
        f"promoted every {accumulator.promotion_interval}" if accumulator.promotion_interval else "never promoted"
    )
    return f"emulated, {accumulator.fraction_bits} bits, {accumulator.rounding}, {promoted}"


def _record(
    name: str, label: str, shape: dict[str, int], error: float, nearest: str, emulated: float
) -> dict[str, Any]:
    record = {
        "op": "FP8 product",
        "mode": f"{label}, {name}",
        "precision": "fp8",
        "shape": shape,
        "value": error,
        "unit": "% relative L2",
    }
    return record | {"yardstick": {"name": nearest, "version": None, "value": emulated}}


def _unit_scales(values: np.ndarray, grouping: str) -> Quantized:
    return Quantized(jnp.asarray(values), jnp.ones(scales_shape(values.shape, grouping), jnp.float32), grouping)


def _promoted(a: np.ndarray, b: np.ndarray) -> jax.Array:
    product = jax.jit(lambda a, b: matmul.matmul(a, b, out_dtype=jnp.float32, implementation="hopper"))
    return product(_unit_scales(a, "tile"), _unit_scales(b, "block"))


@jax.jit
def unpromoted(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b^T in FP32 of E4M3 [128, k]: one tile, whose sum stays in the tensor cores to the end."""

    def kernel(a_ref, b_ref, out, a_slot, b_slot, out_slot, barrier):
        def accumulate(sums):
            @pl.loop(0, a.shape[1] // GROUP)
            def _(step):
                depth = pl.ds(step * GROUP, GROUP)
                for ref, slot in ((a_ref, a_slot), (b_ref, b_slot)):
                    plgpu.copy_gmem_to_smem(ref.at[:, depth], slot, barrier)
                plgpu.barrier_wait(barrier)
                plgpu.wgmma(sums, a_slot, b_slot.transpose((1, 0)))
                plgpu.wgmma_wait(0)

            return sums[...]

        out_slot[...] = pl.run_scoped(accumulate, plgpu.ACC((SIZE, SIZE), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_slot, out)
        plgpu.wait_smem_to_gmem(0)

    operand = tiled((SIZE, GROUP), E4M3)
    result = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    scratch = [operand, operand, plgpu.SMEM(result.shape, result.dtype), plgpu.Barrier(num_arrivals=2)]
    return plgpu.kernel(kernel, out_type=result, scratch_types=scratch)(a, b)


def _xla(precision: jax.lax.Precision) -> Callable:
    """Return XLA's product. cuBLASLt takes the precision as a choice: fast accumulation, or its own promotion."""
    return jax.jit(
        lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32)
    )


PROGRAMS = {
    "XLA, default precision": _xla(jax.lax.Precision.DEFAULT),
    "XLA, highest precision": _xla(jax.lax.Precision.HIGHEST),
    "matmul, promoted every 128": _promoted,
    "the same products, never promoted": unpromoted,
}


if __name__ == "__main__":
    command.run(main)
