"""Train a model: `python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny`.

Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP saves; the same command continues the run. Exit codes: 0 complete, 2 if the command
or its files cannot be used, 1 after another error, 128 + the signal's number after a signal: 130 after Ctrl-C, 143
after SIGTERM, 138 after SIGUSR1, 129 after SIGHUP.
"""

import json
import shlex
import sys

from absl import flags

from deepseek_jax.config import from_config_dict, to_dict
from deepseek_jax.data.pipeline import check_data
from deepseek_jax.evaluation.report import report
from deepseek_jax.inputs import new_folder
from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.parallel.program import resolve_for_training
from deepseek_jax.training.continuation import check_one_step
from deepseek_jax.training.interruption import Abort
from deepseek_jax.training.journal import journal, say
from deepseek_jax.training.pretrain import train
from experiments import command, recipe, session

CONFIG = recipe.Recipe(
    None, "Configuration, such as configs/tiny.py; --config.model.num_layers=8 overrides.", required=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, tokenizer. If it holds a run, the run continues."
)
WANDB = flags.DEFINE_string(
    "wandb", "", "Project of Weights & Biases in which to show the metrics, too; needs the library wandb."
)
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the configuration as JSON and stop.")

BEFORE = "stopped before the training began; nothing is lost, and the same command continues"
AFTER = "the training is complete and saved; the same command makes the rest of its report"


def main(_) -> None:
    """Parse, train, report."""
    config = from_config_dict(CONFIG.value)
    if PRINT_CONFIG.value:
        print(json.dumps(to_dict(config), indent=1))
        return
    if WORKDIR.value is None:
        raise ValueError("--workdir is missing; name the folder of the run, for example --workdir=runs/tiny")
    check_one_step(config)
    workdir = new_folder(WORKDIR.value, "--workdir")
    with journal(workdir), Abort(BEFORE) as abort:
        check_data(config, workdir)
        session.start()
        mesh = make_mesh(config.mesh)
        check_fit(config, mesh)  # what does not fit the devices is refused before there is a workdir
        resolve_for_training(config, mesh)
        result = train(config, workdir, mesh, wandb=WANDB.value)
        if result.interrupted_by is not None:
            again = shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])
            say(f"\nstopped by {result.interrupted_by.name} after step {result.step}; to continue:\n  {again}")
            sys.exit(128 + result.interrupted_by)
        abort.means(AFTER)
        report(config, workdir, result, WANDB.value, say)


if __name__ == "__main__":
    command.run(main)
