"""The final table of a run, made from its `metrics.jsonl`; it does not need the process that trained."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from deepseek_jax.config import Source
from deepseek_jax.inputs import shown
from deepseek_jax.training.metrics import YARDSTICKS, read_rows
from deepseek_jax.training.sheet import SHEET_NAME

NOT_MEASURED = "not measured"  # or not finite; the log says which


def final_table(workdir: Path, corpus_hash: str, checkpoint_steps: list[int], sources: Sequence[Source] = ()) -> str:
    """Return the summary of a complete run as lines of two columns.

    If the run has several `sources`, each has a line with its own bits per byte.
    """
    rows = read_rows(workdir)
    evaluations = [row for row in rows if "eval/bits_per_byte" in row]
    training = [row for row in rows if "train/loss" in row]
    if not evaluations:
        raise ValueError(f"{workdir} has no evaluation in its metrics")
    yardsticks = next((row for row in reversed(rows) if "yardstick/bigram_bits_per_byte" in row), {})
    before, after = evaluations[0], evaluations[-1]
    speeds = [row["speed/tokens_per_second"] for row in training]
    step_seconds = [row["speed/step_seconds"] for row in training]
    compile_seconds = [row["speed/compile_seconds"] for row in training if "speed/compile_seconds" in row]
    bits = after["eval/bits_per_byte"]
    lines = [
        ("held-out bits per byte, before", _text(before["eval/bits_per_byte"])),
        ("held-out bits per byte, after", _text(bits)),
        *source_lines(sources, after.get("eval/source_bits_per_byte", ())),
        *((f"  {name}", _compared(key, bits, yardsticks)) for key, name in YARDSTICKS.items()),
        ("tokens seen, steps", f"{after['tokens_seen']:,}, {after['step']:,}"),
        ("tokens/s (median)", f"{median(speeds):,.0f}" if speeds else NOT_MEASURED),
        (
            "step time (median), compile time",
            f"{median(step_seconds):.3f} s, {' + '.join(f'{value:.1f}' for value in compile_seconds)} s"
            if speeds
            else NOT_MEASURED,
        ),
        ("corpus (SHA-256)", corpus_hash[:16]),
        ("checkpoints", ", ".join(str(step) for step in checkpoint_steps)),
        ("metrics, curves", f"{workdir / 'metrics.jsonl'}, {workdir / SHEET_NAME}"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def source_lines(sources: Sequence[Source], bits_per_byte: Sequence[float | None]) -> list[tuple[str, str]]:
    """Return a name and a text for the bits per byte of each source; nothing if there is one."""
    if len(bits_per_byte) < 2:
        return []
    total = sum(source.weight for source in sources)
    return [
        (f"  {shown(source.path)} ({source.weight / total:.3g})", "nothing held out" if bits is None else f"{bits:.3f}")
        for source, bits in zip(sources, bits_per_byte, strict=True)
    ]


def _text(bits: float | None) -> str:
    return NOT_MEASURED if bits is None else f"{bits:.3f}"


def _compared(key: str, bits: float | None, yardsticks: dict[str, Any]) -> str:
    """Return the text of a yardstick; the bigram's has the distance of the model's `bits` to it."""
    value, is_bigram = yardsticks.get(key), key == "yardstick/bigram_bits_per_byte"
    if is_bigram and value is None and yardsticks:
        return "not counted: too many tokens"
    return _text(value) + (f"  ({bits / value - 1.0:+.1%})" if is_bigram and bits is not None and value else "")
