"""Make the tables of measurements from the records in `experiments/results`: `python -m experiments.results_table`.

Prints those of the README; writes the long one of the kernels to `experiments/results/kernels.md`.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PROVENANCE = ("device", "jax", "date", "commit", "command")
HEAD = "| What | Measured | Yardstick in the same run | On | Date, commit |\n|---|---:|---|---|---|"
SUMMARY_HEAD = "| Kernel | Shapes | Beside it | x that | of DeepGEMM | Largest error |\n|---|---:|---|---:|---:|---:|"
KERNELS = RESULTS / "kernels.md"
KERNEL_HEAD = "| Kernel | Shape | Time | Rate | Beside it | x the first | of DeepGEMM | Error |\n|---|---|---:|---:|---|---:|---:|---:|"


def table(folder: Path = RESULTS) -> str:
    """Return one Markdown row per record of a config, files and records in order."""
    return "\n".join([HEAD, *(_row(record) for record in _records(folder) if "config" in record)])


def kernel_summary(folder: Path = RESULTS) -> str:
    """Return one Markdown row per kernel and unit: from the lowest to the highest ratio over its shapes."""
    kernels = [record for record in _records(folder) if "config" not in record]
    rates = {}
    for record in kernels:
        if record["mode"] == "rate":
            rates.setdefault((record["op"], *_shape_of(record)), record)  # the first yardstick is the one that counts
    groups: dict[tuple, list[dict]] = {}
    for rate in rates.values():
        groups.setdefault((rate["op"], rate["yardstick"]["name"]), []).append(rate)
    others = {(record["op"], *_shape_of(record), record["mode"]): record for record in kernels}
    rows = []
    for (op, yardstick), members in groups.items():
        ratios = [rate["value"] / rate["yardstick"]["value"] for rate in members]
        theirs = [others.get((op, *_shape_of(rate), "ratio to the yardstick")) for rate in members]
        over = [ratio / record["yardstick"]["value"] for ratio, record in zip(ratios, theirs, strict=True) if record]
        error = max(others[(op, *_shape_of(rate), "relative L2 error")]["value"] for rate in members)
        rows.append(f"| `{op}` | {len(members)} | {yardstick} | {_range(ratios)} | {_range(over)} | {error:.1e} |")
    return "\n".join([SUMMARY_HEAD, *rows])


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


def _shape_of(record: dict) -> tuple:
    return tuple(record["shape"].items())


def _range(values: list[float]) -> str:
    texts = sorted({f"{value:.2f}" for value in values}, key=float)
    return " to ".join(dict.fromkeys([texts[0], texts[-1]])) if texts else ""


def _shape(shape: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    KERNELS.write_text(kernel_tables() + "\n")
    print(table(), kernel_summary(), sep="\n\n")
