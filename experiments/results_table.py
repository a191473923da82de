"""Print the tables of measurements in the README from the records in `experiments/results`: `python -m experiments.results_table`."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PROVENANCE = ("device", "jax", "date", "commit", "command")
HEAD = "| What | Measured | Yardstick in the same run | On | Date, commit |\n|---|---:|---|---|---|"
KERNEL_HEAD = "| Kernel | Shape | Time | Rate | Beside it | x the first | of DeepGEMM | Error |\n|---|---|---:|---:|---|---:|---:|---:|"


def table(folder: Path = RESULTS) -> str:
    """Return one Markdown row per record of a config, files and records in order."""
    return "\n".join([HEAD, *(_row(record) for record in _records(folder) if "config" in record)])


def kernel_tables(folder: Path = RESULTS) -> str:
    """Return a Markdown table per run of `pallas_kernels.bench`, with one row per kernel and shape."""
    kernels = (record for record in _records(folder) if "config" not in record)
    runs = itertools.groupby(kernels, key=lambda record: {name: record[name] for name in PROVENANCE})
    return "\n\n".join(_kernel_table(run, list(records)) for run, records in runs)


def _kernel_table(run: dict, records: list[dict]) -> str:
    groups = itertools.groupby(records, key=lambda record: (record["op"], record["shape"]))
    caption = f"{run['device']}, jax {run['jax']}, {run['date']}, {run['commit']}: `{run['command']}`"
    return "\n".join([caption, "", KERNEL_HEAD, *(_kernel_row(list(group)) for _, group in groups)])


def _records(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.json")):
        yield from json.loads(path.read_text())


def _row(record: dict) -> str:
    what = f"`{record['config']}`, {record['precision']}: {record['mode']} ({_shape(record['shape'])})"
    yardstick = record["yardstick"]
    beside = f"{yardstick['name']} {yardstick['version']}: {_number(yardstick['value'])}" if yardstick else ""
    where = f"{record['device']}, jax {record['jax']}"
    return f"| {what} | {_number(record['value'])} {record['unit']} | {beside} | {where} | {record['date']}, {record['commit']} |"


def _kernel_row(records: list[dict]) -> str:
    """`records` are of one kernel on one shape, told apart by their mode; "rate" has one for each yardstick."""
    rates = [record for record in records if record["mode"] == "rate"]
    rate, modes = rates[0], {record["mode"]: record for record in records}
    beside = ", ".join(f"{record['yardstick']['name']} {_number(record['yardstick']['value'])}" for record in rates)
    ratio = rate["value"] / rate["yardstick"]["value"]
    deepgemm = modes.get("ratio to the yardstick")
    cells = [
        f"`{rate['op']}`",
        _shape(rate["shape"]),
        f"{_number(modes['median']['value'])} us",
        f"{_number(rate['value'])} {rate['unit']}",
        beside,
        f"{ratio:.2f}",
        f"{ratio / deepgemm['yardstick']['value']:.2f}" if deepgemm else "",
        f"{modes['relative L2 error']['value']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def _shape(shape: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    print(table(), kernel_tables(), sep="\n\n")
