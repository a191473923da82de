"""Plan a run before it starts: `python -m experiments.plan --config=configs/deepseek_v3.py --devices=256 --chip=v5p`.

Prints parameters, state, FLOPs, tokens, steps and the numbers of devices that work. With --chip of a TPU it also
compiles the training step for that many devices, which need not be there, and prints the memory of each. No array is
made, and nothing runs.
"""

import json
import sys
from pathlib import Path

import jax
from absl import flags

from deepseek_jax.config import from_config_dict
from deepseek_jax.inputs import local_path, shown
from deepseek_jax.plan.chips import CHIPS, find_chip, prepare
from deepseek_jax.plan.report import lines, record
from deepseek_jax.plan.run import make_plan
from experiments import command, recipe
from pallas_kernels.bench.records import provenance

CONFIG = recipe.Recipe(None, "What to plan, such as configs/deepseek_v3.py.", required=True)
DEVICES = flags.DEFINE_integer(
    "devices", None, "Number of devices; by default the smallest whose memory holds the state.", lower_bound=1
)
CHIP = flags.DEFINE_string("chip", None, f"Kind of device: {', '.join(CHIPS)}. The step is compiled for TPUs.")
JSON = flags.DEFINE_string("json", None, "Also write the plan to this file.")


def main(_) -> None:
    """Parse, plan, print."""
    jax.config.update("jax_platforms", "cpu")  # shapes alone: a card or TPU of this machine stays free
    chip = find_chip(CHIP.value) if CHIP.value is not None else None
    if chip and chip.compiles:
        prepare()
    target = None if JSON.value is None else _target(JSON.value)
    plan = make_plan(from_config_dict(CONFIG.value), DEVICES.value, chip, say=lambda text: print(text, file=sys.stderr))
    print("\n".join(lines(plan)))
    if target is not None:
        on = plan.placement
        device = f"{on.fit.num_devices} x {chip.name}, absent" if on and chip else "none"
        text = json.dumps(record(plan) | provenance("experiments.plan", device), indent=1)
        target.write_text(text + "\n")


def _target(text: str) -> Path:
    """Return the file of --json, before anything long begins."""
    path = local_path(text, "--json")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--json = {shown(text)} cannot be written; name a file in a folder that exists")
    return path


if __name__ == "__main__":
    command.run(main)
