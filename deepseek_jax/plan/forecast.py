"""What a step does on the devices of a topology: its memory, what leaves a device, its time and what a run costs.

Every figure says how it was found: **assigned** or **compiled** by the TPU's compiler (`report.py`), **traced** in the
program (`liveness.py`), or **computed** from shapes and rates. Rates are measured shares of stated ones (`rates.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from deepseek_jax.plan.chips import DECIMAL, Chip, duration_text, size_text
from deepseek_jax.plan.counts import IN_GRADIENT, Counts
from deepseek_jax.plan.estimate import Memory
from deepseek_jax.plan.liveness import gradient_bytes
from deepseek_jax.plan.meshes import Fit, axes_text
from deepseek_jax.plan.run import Placement
from deepseek_jax.plan.search import Choice, nearest_that_fits
from deepseek_jax.plan.stages import sent_of, time_of
from deepseek_jax.plan.timing import StepTime, link_of
from deepseek_jax.plan.wire import Sent
from deepseek_jax.training.flops import model_flops_utilization

MEASURED = ("h100", "h200", "h800")  # whose arithmetic is that of the cards the rates were measured on
BLACKWELL = ("b200", "gb300")  # `parallel.program.resolve_for` refuses FP8 on them
SECONDS_PER_HOUR = 3600
GB = 1e9
MOST_CHOICES = 8


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a step does on a number of devices.

    Attributes:
        fit: the config, with its mesh.
        chip: of all devices.
        held: bytes of one device that the layouts say: weights, moments, gradients, copies.
        living: bytes that live at once in the gradient, gradients and copies included, traced; None: a TPU's compiler
            says what the step needs (`Placement.step`).
        sent: what leaves a device in a step.
        time: of a step.
        update: bytes of one device while an average in host memory is updated, between two steps; 0: there is none.
    """

    fit: Fit
    chip: Chip
    held: dict[str, int]
    living: int | None
    sent: list[Sent]
    time: StepTime
    update: int = 0

    @property
    def traced(self) -> float | None:
        """Return the bytes that a device needs, of which the gradient's are traced; None: they are not."""
        if self.living is None:
            return None
        step = self.living + sum(size for name, size in self.held.items() if name not in IN_GRADIENT)
        return max(step, self.update)


def forecast(on: Placement, state: Any, trace: bool, say: Callable[[str], None]) -> Forecast:
    """Return what a step does on the devices of a placement, which has a chip.

    Args:
        on: the placement.
        state: abstract state of its config.
        trace: whether to trace the gradient for its memory: a dozen seconds for V3 on a quiet core.
        say: takes signs of life.
    """
    fit, chip = on.fit, on.chip
    if chip is None:
        raise ValueError("a forecast needs a chip: name one with --topology")
    time = time_of(fit.config, fit.mesh, state, chip)
    if trace:
        say(f"tracing the gradient of {fit.config.name} ...")
    living = gradient_bytes(fit.config, fit.mesh) if trace else None
    sent = sent_of(fit.config, fit.mesh, state, chip)
    return Forecast(fit, chip, on.held, living, sent, time, on.update)


def require_memory(found: Forecast, state: Any, say: Callable[[str], None]) -> None:
    """Refuse a step that the traced program says does not fit.

    Raises:
        ValueError: it does not; the message has the nearest number of devices on which it does, and its flags.
    """
    if found.traced is None or found.traced <= found.chip.memory:
        return
    nearest = nearest_that_fits(found.fit.config, found.fit.num_devices, found.chip, Memory(state, say))
    where = "no number of devices that works is enough"
    if nearest:
        where = f"the nearest that fits: --topology={found.chip.name}:{nearest.num_devices // found.chip.devices}"
        where = f"{where} {nearest.flags}"
    raise ValueError(
        f"{found.fit.config.name} does not fit on {found.fit.num_devices} {found.chip.name}: a device needs"
        f" {found.traced / GB:,.0f} GB and has {found.chip.memory / GB:,.0f}; {where}"
    )


def lines(found: Forecast, counts: Counts) -> list[str]:
    """Return the lines that a person reads."""
    chip, count = found.chip, found.fit.num_devices
    text = [f"a step on {count} devices of {chip.name} ({axes_text(found.fit.mesh)}):", *_memory(found), *_sent(found)]
    if found.fit.config.execution.precision == "fp8" and chip.name in BLACKWELL:
        text.append(
            f"  FP8 has no kernels for {chip.name} here yet: a run refuses it, and its time is what such would take"
        )
    return text + _time(found, counts)


def _memory(found: Forecast) -> list[str]:
    if found.traced is None or found.living is None:
        return []
    inside = sum(size for name, size in found.held.items() if name in IN_GRADIENT)
    rows: list[tuple[str, float, str]] = [(name, size, "computed") for name, size in found.held.items()]
    rows.append(("activations, temporaries", found.living - inside, "traced; gathered weights are among them"))
    if found.update:
        rows.append(("update of the average", found.update, "computed; between two steps, the larger counts"))
    rows.append(("together", found.traced, f"of {found.chip.memory / GB:,.0f} GB"))
    total = max(size for _, size, _ in rows)
    return [f"  {name:<26}{size_text(size, total, DECIMAL):>13}  {how}" for name, size, how in rows]


def _sent(found: Forecast) -> list[str]:
    if not found.sent:
        return ["  nothing leaves a device"]
    most = max(sent.bytes for sent in found.sent)
    rows = ["  leaves a device in a step, computed:      shipped      useful"]
    for sent in found.sent:
        link = link_of(found.chip, found.fit.mesh, sent.axis)
        rate = found.chip.link_in if link == "in" else found.chip.link_out
        where = "inside nodes" if link == "in" and found.chip.node else "between nodes" if found.chip.node else "torus"
        name = f"{sent.kind} over {sent.axis}"
        shipped, useful = (size_text(size, most, DECIMAL, 1) for size in (sent.bytes, sent.useful))
        rows.append(f"    {name:<32}{shipped:>13}{useful:>12}  {where}, {rate / GB:,.0f} GB/s")
    return rows


def _in_unit(total: float) -> Callable[[float], str]:
    """Return what says seconds in the unit that a step of `total` seconds is told in."""
    unit, name = (1.0, "s") if total >= 1.0 else (1e-3, "ms")
    return lambda seconds: f"{seconds / unit:,.2f} {name}"


def _time(found: Forecast, counts: Counts) -> list[str]:
    time, chip, count = found.time, found.chip, found.fit.num_devices
    rate = counts.tokens_per_step / time.total
    share = model_flops_utilization(counts.flops_per_token, rate, chip.peak_bf16 * count)
    took = counts.tokens / rate
    hours = took * count / chip.devices / SECONDS_PER_HOUR
    chip_hours = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
    how = (
        "shares of peak measured on H100 and H200" if chip.name in MEASURED else "shares of peak assumed, not measured"
    )
    said = _in_unit(time.total)
    rows = [
        ("forward", said(time.forward)),
        ("backward", f"{said(time.backward)}, with what is computed again"),
        ("sums, casts", f"{said(time.sums)}, of gradients over micro-batches, and of weights"),
        ("exposed exchange", said(time.exchange)),
        ("exposed weights, gradients", said(time.other)),
        ("idle in the pipeline", said(time.idle)),
        ("optimizer", said(time.optimizer)),
        ("step", f"{said(time.total)} of {counts.tokens_per_step:,} tokens"),
        ("rate", f"{rate:,.0f} tokens/s, {rate / count * chip.devices:,.0f} a chip"),
        ("MFU of the BF16 peak", f"{share:.1%}"),
        ("all tokens", f"{duration_text(took)}, {chip_hours} chip-hours for {counts.tokens:,}"),
    ]
    return [f"  time, computed ({how}; docs/planning.md has how far off):"] + [
        f"    {name:<28}{text}" for name, text in rows
    ]


def record(found: Forecast, counts: Counts) -> dict[str, Any]:
    """Return the same as plain values: bytes and seconds."""
    time = found.time
    return {
        "chip": found.chip.name,
        "time_computed": dataclasses.asdict(time) | {"total": time.total},
        "tokens_per_second_computed": counts.tokens_per_step / time.total,
        "sent_computed": [sent._asdict() for sent in found.sent],
        "gradient_traced": found.living,
    }


def choices_table(choices: list[Choice], chip: Chip, counts: Counts) -> list[str]:
    """Return the lines of the fastest ways that a search found, in the unit of time of the first."""
    text = [f"  {'step':>13}{'tokens/s a chip':>17}{'MFU':>7}{'memory':>9}  flags (times computed, memory estimated)"]
    largest = max((choice.memory for choice in choices[:MOST_CHOICES]), default=0)
    said = _in_unit(choices[0].time.total if choices else 0.0)
    for choice in choices[:MOST_CHOICES]:
        rate = counts.tokens_per_step / choice.time.total
        count = choice.fit.num_devices
        share = model_flops_utilization(counts.flops_per_token, rate, chip.peak_bf16 * count)
        text.append(
            f"  {said(choice.time.total):>13}{rate / count * chip.devices:>17,.0f}{share:>7.1%}"
            f"{size_text(choice.memory, largest, DECIMAL, 0):>9}  {choice.fit.flags or 'as written'}"
        )
    return text
