"""Time the kernels on one Hopper GPU: `python -m pallas_kernels.bench [--op=matmul] [--json=results.json]`.

A row is an operation on a shape. Its time is the sum over every kernel that the public call launches, by CUPTI, so
neither the host nor the gaps between kernels count; the median of 25. What a row is compared with runs in turns with
it, five launches each, because a card slows down while it gets warm. Launches follow each other: operands that fit the
L2 cache are read from there, here and in the yardsticks.

    of peak       of the dense FP8 or BF16 rate of H100 and H200; for GB/s, of the device copy beside it
    error         relative L2 error against the reference in FP32 (BF16 rounding alone is 1.7e-3); 0 for equal bits
    first         seconds of the first call, which traces and compiles
    x XLA         the rate over that of the first yardstick
    x DeepGEMM    the last, over DeepGEMM's own (`shapes.DeepGemm`)
"""

import argparse
import dataclasses
import datetime
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.bench import records
from pallas_kernels.bench.operation import LAUNCHES, Operation, Program
from pallas_kernels.bench.shapes import DeepGemm, Shape
from pallas_kernels.bench.workloads import operations
from pallas_kernels.bench.yardsticks import yardsticks

PEAK = {"fp8": 1979e12, "bf16": 989.5e12}  # FLOP/s, dense, of H100 and H200 SXM (NVIDIA's data sheets)
ONE = {"TFLOP/s": 1e12, "GB/s": 1e9}
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one operation on one shape.

    Attributes:
        operation: its name.
        precision: "fp8" or "bf16".
        shape: the shape.
        figure: DeepGEMM's, if any.
        microseconds: of one call, median.
        kernels: launched by one call.
        rate: in the shape's unit.
        error: relative L2.
        first: seconds of the first call.
        beside: the yardsticks' rates in the same unit; the first is the one that counts.
    """

    operation: str
    precision: str
    shape: Shape
    figure: DeepGemm | None
    microseconds: float
    kernels: int
    rate: float
    error: float
    first: float
    beside: Mapping[str, float]

    @property
    def share(self) -> float:
        """Of the peak, or of the copy's bandwidth."""
        return self.ratio if self.shape.unit == "GB/s" else self.rate * ONE["TFLOP/s"] / PEAK[self.precision]

    @property
    def ratio(self) -> float:
        """Over the first yardstick."""
        return self.rate / next(iter(self.beside.values()))

    @property
    def over_deepgemm(self) -> float | None:
        """The ratio, over DeepGEMM's on the card where it was measured."""
        return self.ratio / self.figure.ratio if self.figure else None


def main() -> None:
    """Parse, measure, report."""
    arguments = parse()
    device = take_gpu()
    print(f"1 x {device.device_kind}, jax {jax.__version__}; drawn shapes: --seed={arguments.seed}")
    common = records.provenance("pallas_kernels.bench", f"1 x {device.device_kind}")
    found = []
    for operation in operations(arguments.seed):
        if arguments.op and operation.name not in arguments.op:
            continue
        print(f"\n{operation.name}\n{HEAD}")
        rows = []
        for row in measure_operation(operation):
            rows.append(row)
            print(format_row(row), flush=True)
            found += [record | common for record in describe(row)]
            if arguments.json:
                records.write(arguments.json, found)  # after each row: an interrupted run keeps what it has
        print(summarize(rows))


def parse() -> argparse.Namespace:
    """Return the arguments."""
    today = int(datetime.date.today().strftime("%Y%m%d"))
    names = [operation.name for operation in operations(today)]
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description="Time the kernels on one Hopper GPU."
    )
    parser.add_argument("--op", action="append", choices=names, help="this operation only; may be repeated")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument(
        "--seed", type=int, default=today, help="draws the shapes of matmul_drawn; today's date by default"
    )
    return parser.parse_args()


def take_gpu() -> jax.Device:
    """Return the first NVIDIA GPU, or end the program with one line.

    JAX's compilation cache is switched off, so that first calls compile.
    """
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        sys.exit("pallas_kernels.bench times kernels with CUPTI and needs an NVIDIA GPU; JAX finds none here")
    jax.config.update("jax_enable_compilation_cache", False)
    return device


def measure_operation(operation: Operation) -> Iterable[Row]:
    """Yield the rows of an operation, or say that it has no kernel."""
    for number, (shape, figure) in enumerate(operation.rows.items()):
        program = operation.program(shape, operation.make_operands(jax.random.key(number), shape))
        start = time.perf_counter()
        try:
            result = jax.block_until_ready(program.function(*program.operands))
        except NotImplementedError as reason:
            print(reason)
            return
        first = time.perf_counter() - start
        error = operation.error(program.operands, result)
        programs = {operation.name: program} | yardsticks(shape, operation.precision)
        seconds, kernels = measure(programs)
        rates = {name: program.work / seconds[name] / ONE[shape.unit] for name, program in programs.items()}
        rate, microseconds = rates.pop(operation.name), 1e6 * seconds[operation.name]
        yield Row(
            operation.name,
            operation.precision,
            shape,
            figure,
            microseconds,
            kernels[operation.name],
            rate,
            error,
            first,
            rates,
        )


def measure(programs: Mapping[str, Program]) -> tuple[dict[str, float], dict[str, int]]:
    """Return the median seconds on the GPU of one call of each program, and the kernels it launches, taking turns."""
    milliseconds: dict[str, list[float]] = {name: [] for name in programs}
    kernels = {}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            _, launches = profiler.measure(program.function, aggregate=False, iterations=LAUNCHES)(*program.operands)
            milliseconds[name] += [sum(time for _, time in launch) for launch in launches]
            kernels[name] = len(launches[0])
    return {name: 1e-3 * statistics.median(times) for name, times in milliseconds.items()}, kernels


def describe(row: Row) -> list[dict[str, Any]]:
    """Return the records of a row: its rate beside every yardstick, times, error, and how it stands to DeepGEMM."""
    base = {"op": row.operation, "precision": row.precision, "shape": row.shape._asdict()}

    def record(
        mode: str, value: float, unit: str, name: str | None = None, beside: float = 0.0, version: str | None = None
    ) -> dict[str, Any]:
        yardstick = {"name": name, "version": version, "value": beside} if name else None
        return base | {"mode": mode, "value": value, "unit": unit, "yardstick": yardstick}

    found = [
        record("rate", row.rate, row.shape.unit, name, beside, f"jax {jax.__version__}")
        for name, beside in row.beside.items()
    ]
    found.append(record("median", row.microseconds, "us"))
    found.append(record("relative L2 error", row.error, ""))
    found.append(record("first call", row.first, "s"))
    if row.figure:
        name = f"DeepGEMM over {next(iter(row.beside))}, on an H200"
        found.append(record("ratio to the yardstick", row.ratio, "x", name, row.figure.ratio))
    return found


SHAPE_WIDTH = 52
HEAD = " " * SHAPE_WIDTH + "       us kernels           rate  of peak    error  first  x XLA x DeepGEMM   beside it"


def format_row(row: Row) -> str:
    """Return the line of a row."""
    shape = " ".join(f"{name}={size}" for name, size in row.shape._asdict().items())
    deepgemm = f"{row.over_deepgemm:.3f}" if row.over_deepgemm else ""
    beside = ", ".join(f"{name} {rate:,.0f}" for name, rate in row.beside.items())
    return (
        f"{shape:{SHAPE_WIDTH}}{row.microseconds:9.1f} {row.kernels:7d} {row.rate:6,.0f} {row.shape.unit:7}"
        f" {row.share:8.1%}"
        f" {row.error:8.1e} {row.first:6.1f} {row.ratio:6.3f} {deepgemm:>10}   {beside}"
    )


def summarize(rows: list[Row]) -> str:
    """Return geometric mean and minimum over the rows, of what they are held against."""
    if not rows:
        return ""
    name, ratios = "DeepGEMM", [row.over_deepgemm for row in rows if row.over_deepgemm]
    if not ratios:
        name, ratios = next(iter(rows[0].beside)), [row.ratio for row in rows]
    return f"x {name}: geometric mean {statistics.geometric_mean(ratios):.3f}, lowest {min(ratios):.3f}"


if __name__ == "__main__":
    main()
