"""A reward model from a fine-tuned `tiny` and pairs of answers of which one was preferred (docs/rewards.md).

    python -m experiments.posttrain --config=configs/tiny_reward_model.py --initial=runs/tiny_sft \
        --config.posttraining.reward_model.pairs=pairs.jsonl --workdir=runs/tiny_reward
"""

from ml_collections import ConfigDict

from configs import tiny_grpo


def get_config() -> ConfigDict:
    """Return one epoch of InstructGPT's loss, 32 pairs an update."""
    config = tiny_grpo.get_config()
    config.name = "tiny_reward_model"
    config.training.update({"eval_every": 0})
    # one epoch, as more overfit there (InstructGPT, appendix C.2)
    own = {"template": "plain", "pairs": "pairs.jsonl", "heldout": 100, "epochs": 1.0}
    config.posttraining = {"stage": "reward_model", "reward_model": own}
    return config
