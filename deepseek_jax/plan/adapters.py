"""The memory of a run of adapters: a frozen base in the form of its products, and a state of adapters alone.

Shapes and layouts are the step's own (`training.adapted`, `PARAMETERS`); no array is made. Activations are not here.
"""

import dataclasses
from typing import Any

import jax

from deepseek_jax.adapters import Lora, base_of, is_weight
from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.stored import param_specs
from deepseek_jax.parameters import Fp8Weight, Weights, layout_in_use, leaf_name
from deepseek_jax.plan.chips import Chip, size_text
from deepseek_jax.plan.counts import beside_state, bytes_per_device, laid_out, local_bytes, state_of
from deepseek_jax.plan.meshes import Fit, axes_text, find_fits, require_fit
from deepseek_jax.training.adapted import abstract_adapters, frozen
from deepseek_jax.training.state import State


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """What a run of adapters holds.

    Attributes:
        config: of the run.
        lora: its adapters.
        frozen: parameters of the base.
        trained: parameters of the adapters.
        fit: where it runs; None if no devices were named, or no number holds it.
        chip: the kind of the devices; None if none was named.
        held: bytes of one device of `fit`, by contents.
        all_weights: bytes that a device of `fit` holds when all weights are trained.
    """

    config: Config
    lora: Lora
    frozen: int
    trained: int
    fit: Fit | None
    chip: Chip | None
    held: dict[str, int]
    all_weights: int


def parse(text: str) -> Lora:
    """Return the adapters of a flag, "RANK:TARGET,TARGET"; alpha is the rank, which changes no size.

    Raises:
        ValueError: the text has another form.
    """
    rank, colon, names = text.partition(":")
    targets = tuple(name.strip() for name in names.split(","))
    if not colon or not rank.isdecimal() or int(rank) < 1 or not all(targets) or len(set(targets)) < len(targets):
        raise ValueError(f"--adapters={text[:64]} is not RANK:TARGETS; write --adapters=16:attention,experts")
    return Lora(rank=int(rank), alpha=float(rank), targets=targets)


def plan_adapters(config: Config, lora: Lora, num_devices: int | None, chip: Chip | None) -> AdapterPlan:
    """Plan adapters beside the model of `config`.

    Args:
        config: any valid config, without a pipeline.
        lora: which weights have adapters.
        num_devices: None: with a chip, the smallest number as written whose devices hold what is computed.
        chip: of the devices.

    Raises:
        ValueError: a target is no part of the model, or a run would refuse the mesh.
    """
    if config.mesh.pipe != 1:
        raise ValueError(f"config.mesh.pipe = {config.mesh.pipe}: adapters train without a pipeline; set it to 1")
    mesh = jax.make_mesh((1,) * len(AXES), AXES, devices=jax.devices()[:1])
    whole = state_of(config)
    with jax.set_mesh(mesh):
        base = jax.eval_shape(lambda params: frozen(config.execution, params), whole["params"])
    state = abstract_adapters(config, lora, Weights(base, whole["router_bias"]), mesh)

    def held(fit: Fit) -> dict[str, int]:
        return held_by_device(fit, base, state)

    fit = require_fit(config, num_devices) if num_devices else None
    if fit is None and chip:
        fits = (f for f in find_fits(config) if not f.changes and chip.has(f.num_devices))
        fit = next((f for f in fits if sum(held(f).values()) <= chip.room), None)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) for tree in (whole, state)]
    beside = sum(bytes_per_device(fit.config, whole, fit.mesh).values()) if fit else 0
    return AdapterPlan(config, lora, sizes[0], sizes[1], fit, chip, held(fit) if fit else {}, beside)


def held_by_device(fit: Fit, base: Any, state: State) -> dict[str, int]:
    """Return what one device holds, in bytes: "base", "adapters", "moments", "gradients", and "copies" if it has any.

    Copies are of what is gathered for the whole step, or with `execution.gather` = "kept" from forward to backward.

    Args:
        fit: where the run is.
        base: shapes of the frozen parameters.
        state: shapes of the state of adapters, laid out for one device.
    """
    mesh, stored = fit.mesh, laid_out(state, fit.mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        specs = param_specs(base)
    on_mesh = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        ),
        base,
        specs,
    )
    beside = beside_state(fit.config, state, mesh).values()
    copies = _copies(fit, on_mesh) + round(sum(sizes["copies"] for sizes in beside))
    held = {
        "base": local_bytes(on_mesh, mesh) + local_bytes(stored["router_bias"], mesh),
        "adapters": local_bytes(stored["params"], mesh),
        "moments": local_bytes(stored["optimizer"], mesh),
        "gradients": round(sum(sizes["gradients"] for sizes in beside)),
    }
    return held | ({"copies": copies} if copies else {})


def _copies(fit: Fit, base: Any) -> int:
    """Return the bytes of the base's matrices that a device gathers and keeps; of one layer at a time it keeps none."""
    gather, total = fit.config.execution.gather, 0
    for path, weight in jax.tree_util.tree_leaves_with_path(base, is_leaf=is_weight):
        weight = base_of(weight)
        values = weight.values if isinstance(weight, Fp8Weight) else weight
        spec = layout_in_use(leaf_name(path), values.ndim)
        whole = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=jax.sharding.NamedSharding(fit.mesh, spec))
        in_use = local_bytes(whole, fit.mesh)
        kept = gather == "step" or (gather == "kept" and len(path) > 1)
        if kept and in_use > local_bytes(values, fit.mesh):
            total += in_use
    return total


def record(plan: AdapterPlan) -> dict[str, Any]:
    """Return the plan as plain values, in bytes."""
    on = {"devices": plan.fit.num_devices, "mesh": dict(plan.fit.mesh.shape)} if plan.fit else {}
    return {
        "config": plan.config.name,
        "precision": plan.config.execution.precision,
        "adapters": dataclasses.asdict(plan.lora),
        "frozen_parameters": plan.frozen,
        "trained_parameters": plan.trained,
        "held_computed": plan.held,
        "all_weights_computed": plan.all_weights,
    } | on


def lines(plan: AdapterPlan) -> list[str]:
    """Return the lines that a person reads."""
    whole = 12 * plan.trained
    third = size_text(whole / 3, whole)
    rows = [
        ("adapters", f"rank {plan.lora.rank} on {', '.join(plan.lora.targets)}"),
        ("trained", f"{plan.trained:,} parameters, {plan.trained / plan.frozen:.2%} of the {plan.frozen:,} frozen"),
        ("state", f"{size_text(whole)}: FP32 {third}, two BF16 moments {third}, gradients {third}"),
    ]
    head = f"{plan.config.name}, {plan.config.execution.precision}; computed from the config:"
    return [head, *(f"  {name:<18}{text}" for name, text in rows), *_on_devices(plan)]


def _on_devices(plan: AdapterPlan) -> list[str]:
    fit, chip = plan.fit, plan.chip
    if fit is None and chip:
        works = ", ".join(str(f.num_devices) for f in find_fits(plan.config) if not f.changes) or "none"
        return [f"{chip.name} holds it on no number that works as written ({works}); use a larger chip"]
    if fit is None:
        return ["memory of a device: --topology, or --devices, says on what"]
    held = plan.held | {"together": sum(plan.held.values()), "all weights": plan.all_weights}
    kind = f" of {chip.name}" if chip else ""
    text = [f"one of {fit.num_devices} devices{kind} ({axes_text(fit.mesh)}), without activations:"]
    text += [f"  {name:<18}{size_text(size, max(held.values())):>12}  computed" for name, size in held.items()]
    text[-1] += ": the same without adapters"
    if chip:
        left = chip.memory - held["together"]
        if left < 0:
            text.append(
                f"It does not fit: a device has {size_text(chip.memory)}, {size_text(-left)} less; use more devices"
            )
        else:
            verdict = "" if held["together"] <= chip.room else "; use more devices"
            rest = f"{size_text(left)} for activations and gathered layers{verdict}"
            text.append(f"of {size_text(chip.memory)} that leaves {rest}")
    return text
