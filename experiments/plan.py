"""Plan a run before it starts: `python -m experiments.plan --config=configs/deepseek_v3.py --topology=h200:128`.

Prints parameters, state, FLOPs, tokens, steps and the numbers of devices that work. With --topology also the memory of
a device, what leaves it in a step, the time of a step and of the run; --search tries every mesh, recomputation and
micro-batch, and pipelines by every schedule. For a TPU its compiler assigns the buffers of the training step, for cards
the step is traced. --decode with --topology plans decoding in place of training. --chip with --devices prints memory
alone. No array is made, and nothing runs.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from absl import flags

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.inputs import local_path, shown
from deepseek_jax.plan import adapters, decode, forecast
from deepseek_jax.plan.chips import CHIPS, Chip, find_chip, find_topology, prepare
from deepseek_jax.plan.counts import count, state_of
from deepseek_jax.plan.report import lines, record
from deepseek_jax.plan.run import Plan, make_plan
from deepseek_jax.plan.search import search
from experiments import command, plan_drawing, recipe
from pallas_kernels.bench.records import provenance

CONFIG = recipe.Recipe(None, "What to plan, such as configs/deepseek_v3.py.", required=True)
DEVICES = flags.DEFINE_integer(
    "devices", None, "Number of devices; by default the smallest whose memory holds the state.", lower_bound=1
)
CHIP = flags.DEFINE_string(
    "chip", None, f"Kind of device: {', '.join(CHIPS)}. A TPU's compiler assigns the step's buffers."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "What to plan for, such as h200:128 (cards), v5p:8x8x8 or tpu7x:256 (chips): memory and time."
)
COMPILE = flags.DEFINE_bool(
    "compile", True, "Let a TPU's compiler assign the step's buffers; with --nocompile and --topology they are traced."
)
SEARCH = flags.DEFINE_bool("search", False, "Find the fastest mesh, recomputation and micro-batch that fit.")
DECODE = flags.DEFINE_bool(
    "decode", False, "Plan decoding on the --topology in place of training: bytes, rates, cache."
)
CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of each sequence that --decode plans for; 4,096 by default.", lower_bound=1
)
ADAPTERS = flags.DEFINE_string(
    "adapters", None, "Plan the memory of adapters in place of all weights: RANK:TARGETS, such as 16:attention,experts."
)
PLOT = flags.DEFINE_string("plot", None, "Also draw memory and bytes of a device against their number to this .png.")
JSON = flags.DEFINE_string("json", None, "Also write the plan to this file.")
DECODE_CONTEXT = 4096


def main(_) -> None:
    """Parse, plan, print."""
    jax.config.update("jax_platforms", "cpu")  # shapes alone: a card or TPU of this machine stays free
    _check_flags()
    chip, num_devices = _where()
    compiled = COMPILE.value and not SEARCH.value
    if not COMPILE.value and not (chip and chip.compiles):
        what = f"{chip.name} is a card" if chip else "no --topology or --chip is given"
        raise ValueError(f"--nocompile: {what}, and a step is compiled for TPUs alone; leave --nocompile out")
    if chip and chip.compiles and compiled and not DECODE.value and ADAPTERS.value is None:
        prepare()
    target = None if JSON.value is None else _target(JSON.value, "--json")
    drawing = None if PLOT.value is None else _target(PLOT.value, "--plot")
    if drawing is not None and drawing.suffix != ".png":
        raise ValueError(f"--plot = {shown(str(drawing))} must end in .png, which is what is drawn")
    config = from_config_dict(CONFIG.value)
    if ADAPTERS.value is not None:
        _adapters(config, chip, num_devices, target)
        return
    if DECODE.value:
        _decode(config, chip, num_devices, target)
        return
    if SEARCH.value:
        _search(config, chip, num_devices)
        return
    plan = dataclasses.replace(
        make_plan(config, num_devices, chip, _say, compiled), by_topology=TOPOLOGY.value is not None
    )
    print("\n".join(lines(plan)))
    found = _forecast(plan, compiled) if TOPOLOGY.value is not None else None
    if target is not None:
        on = plan.placement
        device = f"{on.fit.num_devices} x {chip.name}, absent" if on and chip else "none"
        values = record(plan) | (forecast.record(found, plan.counts) if found else {})
        target.write_text(json.dumps(values | provenance("experiments.plan", device), indent=1) + "\n")
    if drawing is not None:
        plan_drawing.draw(config, state_of(config), drawing)
    if found is not None:
        forecast.require_memory(found, state_of(config), _say)


def _check_flags() -> None:
    """Refuse flags of which one would do nothing.

    Raises:
        ValueError: it names both.
    """
    if CONTEXT.value is not None and not DECODE.value:
        raise ValueError(f"--context = {CONTEXT.value} says what --decode plans for: add --decode")
    if SEARCH.value and not COMPILE.value:
        raise ValueError("--nocompile and --search: a search compiles nothing; leave --nocompile out")
    kinds = {"--decode": DECODE.value, "--adapters": ADAPTERS.value is not None}
    kind = next((name for name, given in kinds.items() if given), None)
    if kind is None:
        return
    if DECODE.value and TOPOLOGY.value is None:
        raise ValueError("--decode needs devices to plan for: add --topology=h200:8, for example")
    of_training = {
        "--search": SEARCH.value,
        "--plot": PLOT.value is not None,
        "--nocompile": not COMPILE.value,
        "--adapters": kind == "--decode" and ADAPTERS.value is not None,
    }
    for name, given in of_training.items():
        if given:
            raise ValueError(f"{name} and {kind}: {name} is of training alone; leave one of them out")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _where() -> tuple[Chip | None, int | None]:
    """Return the chip and number of devices of --topology, or of --chip and --devices."""
    if TOPOLOGY.value is None:
        if SEARCH.value:
            raise ValueError("--search needs devices to search on: add --topology=h200:128, for example")
        return (find_chip(CHIP.value) if CHIP.value is not None else None), DEVICES.value
    for name, flag in (("--json", JSON), ("--plot", PLOT)):
        if SEARCH.value and flag.value is not None:
            raise ValueError(
                f"{name} = {shown(flag.value)} and --search: a search only prints; plan what it finds with {name}"
            )
    for name, flag in (("--chip", CHIP), ("--devices", DEVICES)):
        if flag.value is not None:
            raise ValueError(f"{name} = {flag.value} and --topology = {TOPOLOGY.value}: use --topology alone")
    return find_topology(TOPOLOGY.value)


def _forecast(plan: Plan, compiled: bool) -> forecast.Forecast | None:
    """Print what a step does on the devices of the plan, and return it."""
    on = plan.placement
    if on is None or on.chip is None:
        return None
    trace = not (on.chip.compiles and compiled)
    found = forecast.forecast(on, state_of(plan.config), trace, _say)
    print("\n".join(forecast.lines(found, plan.counts)))
    return found


def _search(config: Config, chip: Chip | None, num_devices: int | None) -> None:
    assert chip is not None and num_devices is not None  # of --topology, which --search needs
    state = state_of(config)
    choices = search(config, num_devices, chip, state, _say)
    print(f"{config.name}, {config.execution.precision}, {num_devices} devices of {chip.name}: {len(choices)} ways fit")
    print("\n".join(forecast.choices_table(choices, chip, count(config, state))))


def _decode(config: Config, chip: Chip | None, num_devices: int | None, target: Path | None) -> None:
    assert chip is not None and num_devices is not None  # of --topology, which --decode needs
    found = decode.decoding(config, num_devices, chip, state_of(config))
    context = CONTEXT.value or DECODE_CONTEXT
    print(f"{config.name}, {config.execution.precision}")
    print("\n".join(decode.lines(found, context)))
    if target is not None:
        values = decode.record(found, context) | provenance("experiments.plan", f"{num_devices} x {chip.name}, absent")
        target.write_text(json.dumps(values, indent=1) + "\n")


def _adapters(config: Config, chip: Chip | None, num_devices: int | None, target: Path | None) -> None:
    found = adapters.plan_adapters(config, adapters.parse(ADAPTERS.value or ""), num_devices, chip)
    print("\n".join(adapters.lines(found)))
    if target is not None:
        device = f"{found.fit.num_devices} x {chip.name}, absent" if found.fit and chip else "none"
        values = adapters.record(found) | provenance("experiments.plan", device)
        target.write_text(json.dumps(values, indent=1) + "\n")


def _target(text: str, flag: str) -> Path:
    """Return the file of --json or --plot, before anything long begins."""
    path = local_path(text, flag)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{flag} = {shown(text)} cannot be written; name a file in a folder that exists")
    return path


if __name__ == "__main__":
    command.run(main)
