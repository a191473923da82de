"""Print the table of measurements in the README from the records in `experiments/results`: `python -m experiments.results_table`."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
HEAD = "| What | Measured | Yardstick in the same run | On | Date, commit |\n|---|---:|---|---|---|"


def table(folder: Path = RESULTS) -> str:
    """Return one Markdown row per record, files and records in order."""
    rows = [_row(record) for path in sorted(folder.glob("*.json")) for record in json.loads(path.read_text())]
    return "\n".join([HEAD, *rows])


def _row(record: dict) -> str:
    what = f"`{record.get('config') or record['op']}`, {record['precision']}: {record['mode']} ({_shape(record['shape'])})"
    yardstick = record["yardstick"]
    beside = f"{yardstick['name']} {yardstick['version']}: {_number(yardstick['value'])}" if yardstick else ""
    where = f"{record['device']}, jax {record['jax']}"
    return f"| {what} | {_number(record['value'])} {record['unit']} | {beside} | {where} | {record['date']}, {record['commit']} |"


def _shape(shape: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    print(table())
