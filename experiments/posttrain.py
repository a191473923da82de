"""Train on behind pre-training: `python -m experiments.posttrain --config=configs/tiny_sft.py --initial=W --workdir=V`.

The configuration says which stage (docs/posttraining.md). --initial is where it begins: a run's workdir,
`workdir@step`, or a folder in Hugging Face's format. Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP saves; the same command
continues the run. Exit codes are those of experiments.train.
"""

import shlex
import sys
from collections.abc import Callable

from absl import flags

from deepseek_jax.data.pipeline import check_data
from deepseek_jax.inputs import new_folder
from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.parallel.program import resolve_for_training
from deepseek_jax.posttraining.distillation import train_distillation
from deepseek_jax.posttraining.grpo import train_grpo
from deepseek_jax.posttraining.reward_model_training import train_reward_model
from deepseek_jax.posttraining.settings import PosttrainingConfig, read
from deepseek_jax.posttraining.sft import train_sft
from deepseek_jax.training.interruption import Abort
from deepseek_jax.training.journal import journal, say
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.pretrain import Result
from experiments import command, recipe, session

CONFIG = recipe.Recipe(None, "Configuration with a section `posttraining`.", required=True, schema=PosttrainingConfig)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, tokenizer. If it holds a run, the run continues."
)
INITIAL = flags.DEFINE_string(
    "initial", None, "Weights to begin with: a run's workdir, workdir@step, or a folder in Hugging Face's format."
)
WANDB = flags.DEFINE_string(
    "wandb", "", "Project of Weights & Biases in which to show the metrics, too; needs the library wandb."
)

BEFORE = "stopped before the training began; nothing is lost, and the same command continues"
# What is told of a run, by the key of its metrics.
MEASURED = {
    "eval/accuracy": "{:.1%} of held-out problems right",
    "eval/pair_accuracy": "{:.1%} of held-out pairs right",
    "eval/loss": "{:.4f} nats per held-out learned token",
}
DRIVERS: dict[str, Callable[..., Result]] = {
    "sft": train_sft,
    "grpo": train_grpo,
    "distillation": train_distillation,
    "reward_model": train_reward_model,
}


def main(_) -> None:
    """Parse, train."""
    config, posttraining = read(CONFIG.value, INITIAL.value or "")
    if WORKDIR.value is None:
        raise ValueError("--workdir is missing; name the folder of the run, for example --workdir=runs/tiny_sft")
    workdir = new_folder(WORKDIR.value, "--workdir")
    with journal(workdir), Abort(BEFORE):
        if posttraining.stage == "sft":  # other stages read no texts
            check_data(config, workdir)
        session.start()
        mesh = make_mesh(config.mesh)
        check_fit(config, mesh)  # what does not fit the devices is refused before there is a workdir
        resolve_for_training(config, mesh)
        result = DRIVERS[posttraining.stage](config, posttraining, workdir, mesh, wandb=WANDB.value)
    if result.interrupted_by is not None:
        again = shlex.join(["python", "-m", "experiments.posttrain", *sys.argv[1:]])
        say(f"\nstopped by {result.interrupted_by.name} after step {result.step}; to continue:\n  {again}")
        sys.exit(128 + result.interrupted_by)
    rows = read_rows(workdir)
    for key, what in MEASURED.items():
        if values := [row[key] for row in rows if key in row]:
            ends = (what.format(value) for value in (values[0], values[-1]))
            say("\n{} before the first step, {} after the last".format(*ends))
    say(f"the run is complete: {workdir}; docs/posttraining.md says how to talk to it and how to export it")


if __name__ == "__main__":
    command.run(main)
