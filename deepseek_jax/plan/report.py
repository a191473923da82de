"""A plan as a person reads it, and as a record."""

import dataclasses
from typing import Any

from deepseek_jax.model.recompute import REPEATING
from deepseek_jax.plan.chips import Chip, duration_text, size_text
from deepseek_jax.plan.memory import StepMemory
from deepseek_jax.plan.meshes import Fit, axes_text, smallest_micro_batch
from deepseek_jax.plan.run import Placement, Plan

NOT_ASSIGNED = "code and some scratch memory come on top"  # of a buffer assignment (`assignment`)


def lines(plan: Plan) -> list[str]:
    """Return the lines that a person reads. Each figure says whether it was computed or compiled."""
    counts, config = plan.counts, plan.config
    whole = 12 * counts.parameters
    third = size_text(whole / 3, whole)
    flops, most = counts.flops_per_token, counts.tokens_per_step
    step = f"{counts.batch_size:,} x {config.data.sequence_length:,}"
    rows = [
        ("parameters", f"{counts.parameters:,} ({_short(counts.parameters)}), MTP {_short(counts.mtp_parameters)}"),
        ("active per token", f"{counts.active:,} ({_short(counts.active)}), without MTP"),
        (
            "state",
            f"{size_text(whole)}: FP32 weights {third}, two BF16 moments {third}, gradients {third}",
        ),
        ("FLOPs", f"{flops:.4g} per token, {flops * most:.4g} per step; recomputation does not count"),
        ("", f"{flops * counts.tokens:.4g} in all"),
        ("tokens", f"{counts.tokens:,} in {counts.steps:,} steps of at most {step}"),
        *_devices(plan),
    ]
    head = f"{config.name}, {config.execution.precision}; computed from the config:"
    return [head, *(f"  {name:<18}{text}" for name, text in rows), *_on_devices(plan)]


def record(plan: Plan) -> dict[str, Any]:
    """Return the same as plain values: counts, bytes, and the changes for each number of devices that works."""
    values = {
        "config": plan.config.name,
        "precision": plan.config.execution.precision,
        "counts": dataclasses.asdict(plan.counts),
        "fits": [{"devices": fit.num_devices, "changes": fit.changes} for fit in plan.fits],
    }
    on = plan.placement
    if on is None:
        return values
    values |= {"devices": on.fit.num_devices, "held_computed": on.held}
    values |= {"on_host_computed": on.on_host} if on.on_host else {}
    values |= {"average_update_computed": on.update} if on.update else {}
    return values | (memory_record(on.fit, on.chip, on.step, on.update) if on.chip and on.step else {})


def memory_record(fit: Fit, chip: Chip, step: StepMemory, update: int = 0) -> dict[str, Any]:
    """Return the memory of one device by a TPU's compiler, as plain values in bytes, with what it was compiled for.

    `update` is what the average's own program needs (`counts.update_bytes`).
    """
    training, data = fit.config.training, fit.config.data
    return {
        "mesh": dict(fit.mesh.shape),
        "changes": fit.changes,
        "execution": dataclasses.asdict(fit.config.execution),
        "micro_batch_size": training.micro_batch_size,
        "sequence_length": data.sequence_length,
        "chip_memory": chip.memory,
        "step_memory": dataclasses.asdict(step),
        "does_fit": step.fits and update <= chip.memory,
    }


def advice(plan: Plan, fit: Fit, of_state: bool = False) -> list[str]:
    """Return flags that lower the memory of a fit's step, as far as they are not in use, and a larger number.

    `of_state` leaves out what only lowers activations.
    """
    config, flags = fit.config, []
    if config.execution.gather != "layer" and fit.num_devices > 1:
        flags.append("--config.execution.gather=layer")
    if config.execution.remat not in REPEATING and not of_state:
        flags.append("--config.execution.remat=full")
    micro_batch = smallest_micro_batch(fit)
    if micro_batch < config.training.micro_batch_size and not of_state:
        flags.append(f"--config.training.micro_batch_size={micro_batch}")
    more = next(iter(plan.holding), None)
    return flags + ([f"{_named(plan, more)} {more.flags}".strip()] if more else [])


def _named(plan: Plan, fit: Fit) -> str:
    """Return the flag that asks for the devices of a fit."""
    chip = plan.placement.chip if plan.placement else None
    if chip and plan.by_topology:
        return f"--topology={chip.name}:{fit.num_devices // chip.devices}"
    return f"--devices={fit.num_devices}"


def _devices(plan: Plan) -> list[tuple[str, str]]:
    written = [str(fit.num_devices) for fit in plan.fits if not fit.changes]
    changed = [fit for fit in plan.fits if fit.changes]
    rows = [("devices", f"as written: {', '.join(written) or 'no number works'}")]
    return rows + [("", f"{fit.num_devices} with {fit.flags}") for fit in changed]


def _on_devices(plan: Plan) -> list[str]:
    on = plan.placement
    if on is None and plan.too_small:
        return _too_small(plan, plan.too_small)
    if on is None:
        return ["memory of a device: --devices and --chip say on what; it must hold the state"]
    kind = f" of {on.chip.name}" if on.chip else ""
    text = [f"one of {on.fit.num_devices} devices{kind} ({axes_text(on.fit.mesh)}):"]
    held = sum(on.held.values())
    total = max(held, on.step.total if on.step else 0)
    text += [f"  {name:<18}{size_text(size, total):>12}  computed" for name, size in on.held.items()]
    if on.chip and on.step:
        text += _compiled(on.chip, on.step) + _verdict(plan, on, on.chip, on.step)
    else:
        text += [f"  {'together':<18}{size_text(held):>12}  computed", *_not_compiled(plan, on)]
    if on.update:
        text.append(
            f"  {'update of the average':<26}{size_text(on.update):>12}  computed; between two steps, not in them"
        )
    text += [f"  {f'{name}, on the host':<26}{size_text(size):>12}  computed" for name, size in on.on_host.items()]
    return text + _least_time(plan, on)


def _compiled(chip: Chip, step: StepMemory) -> list[str]:
    how = f"{step.source} in {step.seconds:.0f} s" + (f"; {NOT_ASSIGNED}" if step.source == "assigned" else "")
    rows = [("the whole step", step.total, how), ("a device has", chip.memory, "")]
    if step.temporaries is not None:
        rows.insert(0, ("temporaries", step.temporaries, f"{step.source}; gradients and copies are among them"))
    if step.peak is not None:
        rows.insert(-1, ("alive at once", step.peak, "compiled"))
    if step.on_host:
        rows.append(("the step, on the host", step.on_host, step.source))
    return [f"  {name:<18}{size_text(size, max(size, step.total)):>12}  {how}".rstrip() for name, size, how in rows]


def _verdict(plan: Plan, on: Placement, chip: Chip, step: StepMemory) -> list[str]:
    fit, held, update = on.fit, sum(on.held.values()), on.update
    share, is_assigned = f"{step.total / chip.memory:.0%} of the memory", step.source == "assigned"
    if step.fits and update <= chip.memory:
        return [f"It fits: {share}{f' by its buffer assignment; {NOT_ASSIGNED}' if is_assigned else ''}."]
    if step.fits:  # the step alone does
        text = [f"It does not fit: the update of the average, between two steps, needs {size_text(update)}."]
        return text + _advised(advice(plan, fit, of_state=True))
    beside = size_text(step.total - held)
    by = f" by its buffer assignment, {share}, which the compiler had not refused yet" if is_assigned else ""
    text = [f"It does not fit{by}. Beside what is listed, {beside} are activations, gathered weights and buffers."]
    return text + _advised(advice(plan, fit))


def _not_compiled(plan: Plan, on: Placement) -> list[str]:
    if on.chip is None:
        return ["Activations come on top; --chip=v5p, for example, compiles the step and says how much."]
    if plan.by_topology:
        return []
    held = sum(on.held.values())
    figures = f"{held / on.chip.memory:.0%} of the card; {_share(on.chip)} the rest is for activations"
    if on.update > on.chip.memory:
        text = f"It does not fit: the update of the average, between two steps, needs {size_text(on.update)}."
        return [text, *_advised(advice(plan, on.fit, of_state=True))]
    if held > on.chip.room:
        return [f"It does not fit: that is {figures}.", *_advised(advice(plan, on.fit, of_state=True))]
    return [
        f"It fits: that is {figures}.",
        "How much those are is known on the card (experiments.benchmarks.training_step prints it).",
    ]


def _too_small(plan: Plan, chip: Chip) -> list[str]:
    written = ", ".join(str(fit.num_devices) for fit in plan.fits if not fit.changes) or "none"
    text = f"{chip.name} is too small: it holds its part of the state on no number that works as written ({written})"
    share = "" if chip.compiles else f"; {_share(chip)} the rest is for activations"
    if not plan.holding:
        return [f"{text}{share}; on another neither: use a larger chip, a smaller model or execution.gather = 'layer'."]
    given = (f"  --chip={chip.name} --devices={fit.num_devices} {fit.flags}" for fit in plan.holding)
    return [f"{text}{share}. With a change:", *given]


def _share(chip: Chip) -> str:
    return f"at most {chip.room / chip.memory:.0%} may be state,"


def _advised(flags: list[str]) -> list[str]:
    return [f"  less memory, perhaps: {flag}" for flag in flags]


def _least_time(plan: Plan, on: Placement) -> list[str]:
    peak = on.chip.peak_bf16 if on.chip else None
    if peak is None:
        return []
    took = duration_text(plan.counts.flops_per_token * plan.counts.tokens / (peak * on.fit.num_devices))
    return [f"At the BF16 peak of all devices, which no run reaches, the tokens take {took} (computed)."]


def _short(count: int) -> str:
    return f"{count / 1e9:,.3f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"
