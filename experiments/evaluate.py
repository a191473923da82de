"""Evaluate a trained model: `python -m experiments.evaluate --workdir=runs/tiny`.

Prints held-out bits per byte, the yardsticks on the same bytes, and how evenly the experts are used: a table, or JSON
with --json. The configuration is the workdir's; --config runs it on another mesh.
"""

import json

from absl import flags

from deepseek_jax.config import from_config_dict
from deepseek_jax.data.pipeline import open_tokenizer
from deepseek_jax.evaluation.workdir import evaluate_workdir
from deepseek_jax.evaluation.yardsticks import measure_yardsticks
from deepseek_jax.inputs import local_path, read_json
from deepseek_jax.posttraining.settings import FILE
from deepseek_jax.training.curves import source_lines
from deepseek_jax.training.workdir import check_workdir, read_config
from experiments import command, recipe, session

CONFIG = recipe.Recipe(None, "The run's configuration, with another mesh or number of batches.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest intact one by default.", lower_bound=0)
YARDSTICKS = flags.DEFINE_bool(
    "yardsticks", True, "Also measure the yardsticks. The bigram reads all tokens of the run again."
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(_) -> None:
    """Parse, evaluate, print."""
    workdir = local_path(WORKDIR.value, "--workdir")
    config = read_config(workdir)
    section = read_json(workdir / FILE) if (workdir / FILE).exists() else {}
    if section.get("stage") == "sft":
        raise ValueError(
            f"--workdir={workdir} learned from conversations, and this command reads texts; its held-out loss is"
            " eval/loss in metrics.jsonl"
        )
    if CONFIG.value is not None:
        config = from_config_dict(CONFIG.value)
        check_workdir(workdir, config, "give its values, or leave --config out: then the run's own is used")
    session.start()
    result, progress = evaluate_workdir(config, workdir, STEP.value)
    values = {
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "eval/bits_per_byte": result.bits_per_byte,
        "eval/loss": result.loss,
    }
    if len(config.data.sources) > 1:
        values["eval/source_bits_per_byte"] = result.source_bits_per_byte
    if YARDSTICKS.value:
        values |= measure_yardsticks(config, workdir, open_tokenizer(config, workdir), progress.tokens_seen)
    values |= {"eval/mtp_loss": result.mtp_loss, "eval/max_vio": result.max_vio_L.tolist()}
    if JSON.value:
        print(json.dumps(values))
        return
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {_show(value)}")
        if name == "eval/source_bits_per_byte":
            for source, text in source_lines(config.data.sources, value):
                print(f"{source:<{width}}  {text}")


def _show(value) -> str:
    if isinstance(value, list):
        return " ".join(_show(item) for item in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    command.run(main)
