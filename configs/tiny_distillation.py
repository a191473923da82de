"""On-policy distillation of a fine-tuned `tiny` from a teacher of the same tokenizer (docs/posttraining.md).

    python -m experiments.posttrain --config=configs/tiny_distillation.py --initial=runs/tiny_sft \
        --config.posttraining.distillation.teacher=runs/tiny_grpo --workdir=runs/tiny_distillation

A smaller student has other values of `model.*`, as the run that it begins with has them.
"""

from ml_collections import ConfigDict

from configs import tiny_grpo

OF_GRPO = "template", "problems", "num_problems", "heldout", "accuracy", "group_size", "steps", "max_new_tokens", "rows"


def get_config() -> ConfigDict:
    """Return the rollouts of `tiny_grpo`, judged by a teacher in the place of rewards."""
    config = tiny_grpo.get_config()
    config.name = "tiny_distillation"
    config.optimizer.learning_rate = (("constant", 1.0, 3e-4),)  # no noise of rewards
    grpo = config.posttraining.grpo.to_dict()
    own = {"teacher": ""} | {name: grpo[name] for name in OF_GRPO}  # to be given
    config.posttraining = {"stage": "distillation", "distillation": own}
    return config
