"""A plan as a person reads it, and as a record."""

import dataclasses
from typing import Any

from deepseek_jax.plan.chips import GIB, Chip
from deepseek_jax.plan.memory import StepMemory
from deepseek_jax.plan.meshes import Fit, smallest_micro_batch
from deepseek_jax.plan.run import Plan
from deepseek_jax.training.flops import peak_flops

SECONDS_PER_DAY = 86400
DEVICE_KINDS = {  # what JAX calls a device of a chip, for its peak
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}


def lines(plan: Plan) -> list[str]:
    """Return the lines that a person reads. Each figure says whether it was computed or compiled."""
    counts, config = plan.counts, plan.config
    third = _bytes(4 * counts.parameters)
    flops, most = counts.flops_per_token, counts.tokens_per_step
    step = f"{counts.batch_size:,} x {config.data.sequence_length:,}"
    rows = [
        ("parameters", f"{counts.parameters:,} ({_short(counts.parameters)}), MTP {_short(counts.mtp_parameters)}"),
        ("active per token", f"{counts.active:,} ({_short(counts.active)}), without MTP"),
        (
            "state",
            f"{_bytes(12 * counts.parameters)}: FP32 weights {third}, two BF16 moments {third}, gradients {third}",
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
    fit, chip = plan.fit, plan.chip
    values = {
        "config": plan.config.name,
        "precision": plan.config.execution.precision,
        "counts": dataclasses.asdict(plan.counts),
        "fits": [{"devices": f.num_devices, "changes": f.changes} for f in plan.fits],
        "devices": fit.num_devices if fit else None,
        "chip": chip.name if chip else None,
        "held_computed": plan.held,
    }
    return values | (memory_record(fit, chip, plan.step) if fit and plan.step else {})


def memory_record(fit: Fit, chip: Chip, step: StepMemory) -> dict[str, Any]:
    """Return the compiled memory of one device as plain values, in bytes, with what it was compiled for."""
    training, data = fit.config.training, fit.config.data
    return {
        "mesh": dict(fit.mesh.shape),
        "changes": fit.changes,
        "execution": dataclasses.asdict(fit.config.execution),
        "micro_batch_size": training.micro_batch_size,
        "sequence_length": data.sequence_length,
        "chip_memory": chip.memory,
        "step_compiled": dataclasses.asdict(step),
        "does_fit": step.fits(chip),
    }


def advice(plan: Plan) -> list[str]:
    """Return flags that lower the memory of a step, as far as they are not in use, and the next number of devices."""
    config, flags = plan.fit.config, []
    if config.execution.gather == "step" and plan.fit.num_devices > 1:
        flags.append("--config.execution.gather=layer")
    if config.execution.remat != "full":
        flags.append("--config.execution.remat=full")
    micro_batch = smallest_micro_batch(plan.fit)
    if micro_batch < config.training.micro_batch_size:
        flags.append(f"--config.training.micro_batch_size={micro_batch}")
    more = next((fit for fit in plan.fits if fit.num_devices > plan.fit.num_devices), None)
    return flags + ([f"--devices={more.num_devices} {more.flags}".strip()] if more else [])


def _devices(plan: Plan) -> list[tuple[str, str]]:
    written = [str(fit.num_devices) for fit in plan.fits if not fit.changes]
    changed = [fit for fit in plan.fits if fit.changes]
    rows = [("devices", f"as written: {', '.join(written) or 'no number works'}")]
    return rows + [("", f"{fit.num_devices} with {fit.flags}") for fit in changed]


def _on_devices(plan: Plan) -> list[str]:
    fit, chip, step = plan.fit, plan.chip, plan.step
    if fit is None:
        why = "no number of devices that works holds the state" if chip else "--devices and --chip plan one mesh"
        return [f"memory of a device: {why}"]
    where = f"{fit.num_devices} {'devices of ' + chip.name if chip else 'devices'}"
    axes = " x ".join(f"{axis} {size}" for axis, size in fit.mesh.shape.items() if size > 1) or "one device"
    text = [f"one of {where} ({axes}):"]
    text += [f"  {name:<18}{_bytes(size):>12}  computed" for name, size in plan.held.items()]
    if step is None:
        text.append(f"  {'together':<18}{_bytes(sum(plan.held.values())):>12}  computed")
        return text + [_not_compiled(plan)] + _least_time(plan)
    if step.temporaries is not None:
        text.append(f"  {'temporaries':<18}{_bytes(step.temporaries):>12}  compiled; gradients are among them")
    text.append(f"  {'the whole step':<18}{_bytes(step.total):>12}  compiled in {step.seconds:.0f} s")
    text.append(f"  {'a device has':<18}{_bytes(chip.memory):>12}")
    return text + _verdict(plan) + _least_time(plan)


def _verdict(plan: Plan) -> list[str]:
    if plan.does_fit:
        return [f"It fits: {plan.step.total / plan.chip.memory:.0%} of the memory."]
    rest = plan.step.total - sum(plan.held.values())
    text = [f"It does not fit. Beside what is listed, {_bytes(rest)} are activations, gathered weights and buffers."]
    return text + [f"  less memory, perhaps: {flags}" for flags in advice(plan)]


def _not_compiled(plan: Plan) -> str:
    if plan.chip is None:
        return "Activations come on top; --chip=v5p, for example, compiles the step and says how much."
    share = sum(plan.held.values()) / plan.chip.memory
    return (
        f"That is {share:.0%} of a device of {plan.chip.name}. Activations come on top: the step of an NVIDIA card is"
        " compiled on the card (experiments.benchmarks.training_step prints its memory)."
    )


def _least_time(plan: Plan) -> list[str]:
    peak = peak_flops(DEVICE_KINDS[plan.chip.name]) if plan.chip else None
    if peak is None:
        return []
    days = plan.counts.flops_per_token * plan.counts.tokens / (peak * plan.fit.num_devices) / SECONDS_PER_DAY
    return [f"At the BF16 peak of all devices, which no run reaches, the tokens take {days:,.1f} days (computed)."]


def _short(count: int) -> str:
    return f"{count / 1e9:,.3f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"


def _bytes(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
