"""0.3B parameters from text to a model that reasons about word problems, on one H200 in minutes (docs/r1.md).

    python -m experiments.studies.gsm8k --gsm8k=train.jsonl --runs=runs/gsm8k

makes the data and runs the stages, which are ordinary runs:

    gsm8k_r1.py:base        pre-training on problems made by code, GSM8K's training texts, and Python's own source
    gsm8k_r1.py:sft         fine-tuning on GSM8K's solutions, and on the task's in two ways: with steps, and without
    gsm8k_r1.py:grpo        reinforcement learning on the task, with 1 for a right answer
    gsm8k_r1.py:control     the same with a reward that knows nothing (`posttraining.rewards.chance`), from `sft`, too
    gsm8k_r1.py:steps       fine-tuning from `base` on the answers with steps alone, which is what R1's cold start shows
    gsm8k_r1.py:steps_grpo  `grpo`, from `steps`
    gsm8k_r1.py:zero        `grpo`, from `base`: no fine-tuning, as R1-Zero

Paths are those that the study makes; give others by `--config.data.sources` and `--initial`.
"""

from ml_collections import ConfigDict

from configs import v3_300m

RUNS = "runs/gsm8k"
TASK = "word_problems:2-6"


def get_config(stage: str = "grpo") -> ConfigDict:
    """Return the configuration of a stage; see the module."""
    config = v3_300m.get_config()
    config.name = f"gsm8k_{stage}"
    config.training.update({"checkpoint_every": 10**6, "keep_checkpoints": 1, "log_every": 1})  # one at the end
    STAGES[stage](config)
    return config


def _base(config: ConfigDict) -> None:
    config.optimizer.learning_rate = (("constant", 0.4, 1e-3), ("cosine", 1.0, 1e-4))
    config.optimizer.warmup_steps = 50
    config.data.tokenizer = f"{RUNS}/data/tokenizer.json"  # every digit is a token
    config.data.sources = (
        {"path": f"{RUNS}/data/texts.jsonl", "weight": 0.8},
        {"path": f"{RUNS}/data/gsm8k.jsonl", "weight": 0.1},
        {"path": "stdlib", "weight": 0.1},
    )
    config.data.heldout_fraction = 0.002
    config.training.update({"num_tokens": 900 * 32768.0, "eval_batches": 4})


def _behind(config: ConfigDict, initial: str) -> None:
    """What both stages behind pre-training share."""
    config.loss.sequence_balance_weight = 0.0  # biases are frozen, and nothing else moves the loads
    config.optimizer.update({"weight_decay": 0.0, "bias_update_rate": (("constant", 1.0, 0.0),)})
    config.data.update({"mask_documents": True, "reset_positions": True, "heldout_fraction": 0.0})
    config.training.update({"num_tokens": 1e12, "initial_weights": f"{RUNS}/{initial}"})


def _sft(config: ConfigDict, files: tuple[str, ...] = ("solutions", "hasty")) -> None:
    _behind(config, "base")
    config.optimizer.update({"learning_rate": (("constant", 1e-9, 2e-4), ("cosine", 1.0, 2e-5)), "warmup_steps": 10})
    config.data.update(
        {
            "sources": tuple({"path": f"{RUNS}/data/{name}.jsonl"} for name in files),
            "text_field": "messages",
            "sequence_length": 640,  # GSM8K's longest solution has 560 tokens
        }
    )
    config.training.update({"batch_size": (("constant", 1.0, 24),), "micro_batch_size": 24})
    config.posttraining = {"stage": "sft", "sft": {"template": "plain", "epochs": 1.0, "mtp": "off"}}


def _grpo(config: ConfigDict, initial: str = "sft") -> None:
    _behind(config, initial)
    config.optimizer.update({"learning_rate": (("constant", 1.0, 3e-5),), "warmup_steps": 5})
    config.data.sequence_length = 320
    config.training.update({"batch_size": (("constant", 1.0, 256),), "micro_batch_size": 128, "eval_every": 20})
    config.posttraining = {
        "stage": "grpo",
        "grpo": {
            "variant": "grpo",
            "overrides": {"kl_weight": 0.0},
            "template": "folder",
            "problems": TASK,
            "num_problems": 4000,
            "heldout": 200,
            "rewards": {"gsm8k": 1.0},
            "accuracy": "gsm8k",
            "on_failure": "stop",
            "reward_seconds": 30.0,
            "reward_workers": 4,
            "group_size": 16,
            "updates": 1,
            "steps": 100,
            "max_new_tokens": 192,  # the longest solution has 175
            "rows": 128,
        },
    }


def _control(config: ConfigDict) -> None:
    _grpo(config)
    config.posttraining.grpo.rewards = {"gsm8k": 0.0, "chance": 1.0}  # the answer is measured, and gives nothing


def _steps(config: ConfigDict) -> None:
    _sft(config, ("solutions",))


def _steps_grpo(config: ConfigDict) -> None:
    _grpo(config, "steps")


def _zero(config: ConfigDict) -> None:
    _grpo(config, "base")
    config.posttraining.grpo.template = "plain"  # pre-training leaves none in its folder


STAGES = {
    "base": _base,
    "sft": _sft,
    "grpo": _grpo,
    "control": _control,
    "steps": _steps,
    "steps_grpo": _steps_grpo,
    "zero": _zero,
}
