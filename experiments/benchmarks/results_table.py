"""The tables of measurements, made from the records in `experiments/results`.

`python -m experiments.benchmarks.results_table` prints the tables of the README and of `docs/`, and writes the tables
of every kernel and shape to `experiments/results/kernels.md`.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments import command

RESULTS = Path(__file__).parents[1] / "results"
PROVENANCE = ("device", "jax", "date", "commit", "command")
HEAD = (
    "| Config | Precision | Tokens a step | Tokens/s | Step | Model FLOPs | of the BF16 peak | Memory | Trace, compile"
    " | Beside it | On "
    "| Date, commit |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|---|"
)
SHORT_HEAD = (
    "| Config | Precision | Tokens/s | Step | of the BF16 peak | Memory | transformers, compiled |\n"
    "|---|---|---:|---:|---:|---:|---:|"
)
SUMMARY_HEAD = (
    "| Kernel | On | Shapes | Beside it | x that | of DeepGEMM | Largest error |\n|---|---|---:|---|---:|---:|---:|"
)
KERNELS = RESULTS / "kernels.md"
KERNEL_HEAD = (
    "| Kernel | Shape | Time | Rate | Beside it | x the first | of DeepGEMM | Error |\n"
    "|---|---|---:|---:|---|---:|---:|---:|"
)
CONVERSION_HEAD = (
    "| On | Checkpoint | First import | Second import | Export | Most memory |\n|---|---:|---:|---:|---:|---:|"
)
CONVERSION_MODES = ("import, programs compiled on the way", "import", "export")


def table() -> str:
    """Return one Markdown row per run of `experiments.benchmarks.training_step`: a config, a precision, a batch."""
    steps = (record for record in _records() if "config" in record)
    runs = itertools.groupby(
        steps, key=lambda record: [record[name] for name in ("config", "precision", "shape", *PROVENANCE)]
    )
    return "\n".join([HEAD, *(_row(list(records)) for _, records in runs)])


def short_table() -> str:
    """Return what of `table` a reader needs first: the README's."""
    steps = (record for record in _records() if "config" in record)
    runs = itertools.groupby(steps, key=lambda record: (record["config"], record["precision"]))
    return "\n".join([SHORT_HEAD, *(_short_row(list(records)) for _, records in runs)])


def kernel_summary() -> str:
    """Return one Markdown row per kernel, yardstick and card, with the lowest and the highest ratio over its shapes."""
    members: dict[tuple, list[Measured]] = {}
    for group in _by_shape(record for record in _records() if "config" not in record):
        measured = _measured(group)
        members.setdefault(
            (measured.rate["op"], measured.rate["yardstick"]["name"], measured.rate["device"]), []
        ).append(measured)
    rows = []
    for (op, yardstick, device), rates in members.items():
        over = [measured.over_deepgemm for measured in rates if measured.over_deepgemm]
        cells = (
            f"`{op}`",
            device,
            f"{len(rates)}",
            yardstick,
            _range([measured.ratio for measured in rates]),
            _range(over),
        )
        rows.append(f"| {' | '.join(cells)} | {max(measured.error for measured in rates):.1e} |")
    return "\n".join([SUMMARY_HEAD, *rows])


def kernel_tables() -> str:
    """Return a Markdown table per run of `pallas_kernels.bench`, with one row per kernel and shape."""
    kernels = (record for record in _records() if "config" not in record)
    runs = itertools.groupby(kernels, key=lambda record: {name: record[name] for name in PROVENANCE})
    return "\n\n".join(_kernel_table(run, list(records)) for run, records in runs)


def conversion_table() -> str:
    """Return one Markdown row per run of `experiments.benchmarks.hf_benchmark`: rates, and their share of a plain cold
    read.
    """
    runs = (json.loads(path.read_text()) for path in sorted((RESULTS / "huggingface").glob("*.json")))
    return "\n".join([CONVERSION_HEAD, *map(_conversion_row, runs)])


def _conversion_row(records: list[dict]) -> str:
    modes = {record["mode"]: record for record in records}
    rates = (
        f"{record['value']:.2f} GB/s, {record['value'] / record['yardstick']['value']:.0%}"
        for record in (modes[mode] for mode in CONVERSION_MODES)
    )
    most = max(record["peak_anonymous_bytes_beyond_weights"] for record in records)
    first = records[0]
    size = f"{first['shape']['bytes'] / 1e9:.0f} GB in {first['shape']['files']} files"
    return f"| {' | '.join([first['device'], size, *rates])} | {most / 1e9:.1f} GB |"


def _kernel_table(run: dict, records: list[dict]) -> str:
    caption = f"{run['device']}, jax {run['jax']}, {run['date']}, {run['commit']}: `{run['command']}`"
    return "\n".join([caption, "", KERNEL_HEAD, *map(_kernel_row, _by_shape(records))])


def _records() -> Iterator[dict]:
    for path in sorted(RESULTS.glob("*.json")):
        yield from json.loads(path.read_text())


def _quantity(records: list[dict], mode: str) -> str:
    record = next((record for record in records if record["mode"] == mode), None)
    return f"{_number(record['value'])} {record['unit']}" if record else ""


def _short_row(records: list[dict]) -> str:
    first, step = records[0], next(record for record in records if record["mode"] == "train step")
    modes = ("train step, median", "MFU of the BF16 peak", "memory per device, compiled")
    beside = _number(step["yardstick"]["value"]) if step["yardstick"] else ""
    cells = [f"`{first['config']}`", first["precision"].upper(), _number(step["value"])]
    return f"| {' | '.join([*cells, *(_quantity(records, mode) for mode in modes), beside])} |"


def _row(records: list[dict]) -> str:
    first, shape = records[0], records[0]["shape"]
    step = next(record for record in records if record["mode"] == "train step")
    yardstick = step["yardstick"]

    def measured(mode: str) -> str:
        return _quantity(records, mode)

    cells = [
        f"`{first['config']}`",
        first["precision"].upper(),
        f"{shape['batch']} x {shape['sequence']}",
        _number(step["value"]),
        measured("train step, median"),
        measured("model FLOPs"),
        measured("MFU of the BF16 peak"),
        measured("memory per device, compiled"),
        f"{measured('trace, cold')}, {measured('compile, cold')}",
        f"{yardstick['name']} {yardstick['version']}: {_number(yardstick['value'])}" if yardstick else "",
        f"{first['device']}, jax {first['jax']}",
        f"{first['date']}, {first['commit']}",
    ]
    return f"| {' | '.join(cells)} |"


class Measured(NamedTuple):
    """The measurements of one kernel on one shape."""

    rate: dict  # the record of the first yardstick, which the ratio is taken to
    beside: list[dict]  # one record per yardstick
    microseconds: float
    ratio: float  # to the first yardstick
    over_deepgemm: float | None
    error: float


def _by_shape(records: Iterable[dict]) -> Iterator[list[dict]]:
    """Yield the records of each kernel on each shape. They follow each other, and differ in their mode."""
    for _, group in itertools.groupby(records, key=lambda record: (record["op"], record["shape"])):
        yield list(group)


def _measured(records: list[dict]) -> Measured:
    beside, modes = (
        [record for record in records if record["mode"] == "rate"],
        {record["mode"]: record for record in records},
    )
    rate, deepgemm = beside[0], modes.get("ratio to the yardstick")
    ratio = rate["value"] / rate["yardstick"]["value"]
    over = ratio / deepgemm["yardstick"]["value"] if deepgemm else None
    return Measured(rate, beside, modes["median"]["value"], ratio, over, modes["relative L2 error"]["value"])


def _kernel_row(records: list[dict]) -> str:
    measured = _measured(records)
    rate = measured.rate
    cells = [
        f"`{rate['op']}`",
        _shape(rate["shape"]),
        f"{_number(measured.microseconds)} us",
        f"{_number(rate['value'])} {rate['unit']}",
        ", ".join(
            f"{record['yardstick']['name']} {_number(record['yardstick']['value'])}" for record in measured.beside
        ),
        f"{measured.ratio:.2f}",
        f"{measured.over_deepgemm:.2f}" if measured.over_deepgemm else "",
        f"{measured.error:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def _range(values: list[float]) -> str:
    ends = (f"{end:.2f}" for end in (min(values), max(values))) if values else ()
    return " to ".join(dict.fromkeys(ends))  # one value if both ends are equal


def _shape(shape: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main(_) -> None:
    """Write the tables of the kernels, print the others."""
    KERNELS.write_text(kernel_tables() + "\n")
    print(short_table(), table(), kernel_summary(), conversion_table(), sep="\n\n")


if __name__ == "__main__":
    command.run(main)
