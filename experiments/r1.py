"""R1's stages from nothing on two CPU cores: `make r1`, or `python -m experiments.r1 --workdir=runs/r1`.

A tiny model with random weights is fine-tuned on a few examples of a task made by code, learns by GRPO, and is sampled
from for a second round. Prints held-out accuracy and answers before and after each stage, and draws the curves. Ctrl-C
saves; the same command continues. docs/r1.md has what it gave.
"""

import shlex
import sys
import time

from absl import flags

from deepseek_jax.inputs import new_folder
from deepseek_jax.posttraining import r1, r1_report
from deepseek_jax.posttraining.r1_record import keep_plan
from deepseek_jax.posttraining.r1_settings import R1Config, read_plan
from deepseek_jax.training.journal import say
from experiments import command, recipe, session

CONFIG = recipe.Recipe("configs/tiny_r1.py", "Configuration with a section `r1`.", schema=R1Config)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the stages. If it holds some, they continue.", required=True)


def main(_) -> None:
    """Run the stages, and tell what each gave."""
    begin = time.monotonic()
    workdir = new_folder(WORKDIR.value, "--workdir")
    plan = read_plan(CONFIG.value, workdir)
    session.start()
    workdir.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, workdir)
    stopped = r1.run_stages(plan, workdir, say)
    if stopped is not None:
        again = shlex.join(["python", "-m", "experiments.r1", *sys.argv[1:]])
        say(f"\nstopped by {stopped.name}; to continue:\n  {again}")
        sys.exit(128 + stopped)
    say(f"\n{r1_report.table(plan, workdir)}\n{time.monotonic() - begin:.0f} seconds")
    if drawing := r1_report.draw(plan, workdir):
        say(f"curves: {drawing}")


if __name__ == "__main__":
    command.run(main)
