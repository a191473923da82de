"""Train a model: `python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny`.

Ctrl-C or SIGTERM saves; the same command continues the run. Exit codes: 0 complete, 130 after Ctrl-C, 143 after
SIGTERM, 2 if the command or its files cannot be used, 1 after another error.
"""

import json
import shlex
import sys
from pathlib import Path

import jax
from absl import flags

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.data.pipeline import check_data, open_corpus
from deepseek_jax.evaluation.yardsticks import add_yardsticks
from deepseek_jax.inference.generate import stream
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inputs import new_folder
from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.curves import final_table
from deepseek_jax.training.pretrain import Result, train
from deepseek_jax.training.sheet import draw_sheet
from deepseek_jax.training.state import weights_of
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

PROMPT = "def "
SAMPLE_TOKENS = 120
SAMPLING = Sampling(temperature=0.8, top_p=0.95, top_k=0)


def main(_) -> None:
    """Parse, train, report."""
    config = from_config_dict(CONFIG.value)
    if PRINT_CONFIG.value:
        print(json.dumps(to_dict(config), indent=1))
        return
    if WORKDIR.value is None:
        raise ValueError("--workdir is missing; name the folder of the run, for example --workdir=runs/tiny")
    workdir = new_folder(WORKDIR.value, "--workdir")
    check_data(config, workdir)
    session.start()
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)  # what does not fit the devices is refused before there is a workdir
    resolve_for(config, mesh)
    result = train(config, workdir, mesh, wandb=WANDB.value)
    if result.interrupted_by is not None:
        again = shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])
        print(f"\nstopped by {result.interrupted_by.name} after step {result.step}; to continue:\n  {again}")
        sys.exit(128 + result.interrupted_by)
    report(config, workdir, result)


def report(config: Config, workdir: Path, result: Result) -> None:
    """Draw the curves, then print the final table and a sampled continuation."""
    add_yardsticks(config, workdir, result.tokenizer, result.step, result.tokens_seen, WANDB.value)
    checkpoints = Checkpoints(workdir, keep=None)  # every process opens it: Orbax waits for all
    steps = checkpoints.steps()
    checkpoints.close()
    if jax.process_index() > 0:
        return
    draw_sheet(config, workdir, sum(leaf.size for leaf in jax.tree.leaves(weights_of(result.state).params)))
    print(
        "\n" + final_table(workdir, open_corpus(config, result.tokenizer, workdir).digest, steps, config.data.sources)
    )
    if jax.process_count() > 1:
        print(f"\nThe weights are spread over {jax.process_count()} processes; for a sample:")
        print(shlex.join(["python", "-m", "experiments.generate", f"--workdir={workdir}", f"--prompt={PROMPT}"]))
        return
    weights = weights_of(result.state)
    room = config.data.sequence_length - len(result.tokenizer.encode(PROMPT)) - 1
    num_tokens = min(SAMPLE_TOKENS, room)
    text = stream(config, weights, result.tokenizer, PROMPT, num_tokens, SAMPLING, config.seed)
    sample = command.for_terminal("".join(text))
    print(f"\nsample, temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}:\n\n{PROMPT}{sample}\n")


if __name__ == "__main__":
    command.run(main)
