"""GRPO of a fine-tuned `tiny` on sorting digits; begin with a model that answers in R1's form (docs/grpo.md).

python -m experiments.posttrain --config=configs/tiny_grpo.py --initial=runs/tiny_sft --workdir=runs/tiny_grpo
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """Return `tiny` with GRPO as DeepSeekMath has it, without a KL."""
    config = tiny.get_config()
    config.name = "tiny_grpo"
    config.loss.sequence_balance_weight = 0.0  # biases are frozen, and nothing else moves the loads
    config.optimizer.update(
        {
            "learning_rate": (("constant", 1.0, 1e-4),),
            "warmup_steps": 5,
            "weight_decay": 0.0,
            "bias_update_rate": (("constant", 1.0, 0.0),),  # frozen
        }
    )
    config.data.update({"sequence_length": 128, "mask_documents": True, "reset_positions": True})
    config.training.update(
        {
            "num_tokens": 1e12,  # the steps end the run
            "batch_size": (("constant", 1.0, 64),),
            "micro_batch_size": 16,
            "eval_every": 20,
            "checkpoint_every": 20,
            "log_every": 1,
        }
    )
    config.posttraining = {
        "stage": "grpo",
        "grpo": {
            "variant": "grpo",
            "overrides": {"kl_weight": 0.0},
            "template": "plain",  # as tiny_sft
            "problems": "sort_digits:4-6",
            "num_problems": 2000,
            "heldout": 200,
            "rewards": {"text": 1.0, "format": 0.1},
            "accuracy": "text",
            "on_failure": "stop",
            "reward_seconds": 30.0,
            "reward_workers": 1,
            "group_size": 8,
            "updates": 1,
            "steps": 100,
            "max_new_tokens": 64,
            "rows": 64,
        },
    }
    return config
