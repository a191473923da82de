"""R1's stages, as studies begin with them: the folder keeps its plan, and a signal ends the study."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.posttraining import r1
from deepseek_jax.posttraining.r1_record import keep_plan
from deepseek_jax.posttraining.r1_settings import Plan, read_plan
from deepseek_jax.training.journal import say


def run_stages(tree: dict[str, Any], workdir: Path, devices: Sequence[Any] | None = None) -> Plan:
    """Run the stages of a configuration that `workdir` does not have, and return their plan; a signal ends the study.

    Args:
        tree: the configuration, as `r1_settings.read_plan` takes it.
        workdir: of all stages; made if it does not exist.
        devices: that the stages run on; all by default.

    Raises:
        ValueError: `workdir` holds stages of another configuration, or as `r1.run_stages`.
    """
    plan = read_plan(tree, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, workdir)
    stop_if(r1.run_stages(plan, workdir, say, devices))
    return plan


def config_name(plan: Plan) -> str:
    """Return what records call the configuration of a plan, which is that of its folder."""
    return f"{plan.shared['name']}, seed {plan.shared['seed']}"


def stop_if(stopped: signal.Signals | None) -> None:
    """End the study where a signal ended a run."""
    if stopped is not None:
        say(f"\nstopped by {stopped.name}; the same command continues")
        sys.exit(128 + stopped)
