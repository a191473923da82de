"""Fine-tuning of `tiny` on conversations of your own: a minute or two on two CPU cores for 1,000 short ones.

    python -m experiments.posttrain --config=configs/tiny_sft.py --initial=runs/tiny --workdir=runs/tiny_sft \
        --config.data.sources=chats.jsonl
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """Return `tiny` with V3's recipe of fine-tuning, at a rate that moves a small model."""
    config = tiny.get_config()
    config.name = "tiny_sft"
    config.loss.sequence_balance_weight = 0.0  # biases are frozen, and nothing else moves the loads
    config.optimizer.update(
        {
            # a tenth of pre-training's rate, to a fifth of it: the report's 5e-6 is a 44th of its 2.2e-4
            "learning_rate": (("constant", 1e-9, 3e-4), ("cosine", 1.0, 6e-5)),
            "warmup_steps": 5,
            "weight_decay": 0.0,
            "bias_update_rate": (("constant", 1.0, 0.0),),  # frozen
        }
    )
    config.data.update(
        {
            "sources": ({"path": "chats.jsonl"},),
            "text_field": "messages",
            "heldout_fraction": 0.05,
            "mask_documents": True,
            "reset_positions": True,
        }
    )
    config.training.update({"num_tokens": 1e12, "eval_every": 50, "eval_batches": 8})  # the epochs end the run
    # tiny's own tokenizer has no tokens for turns
    config.posttraining = {"stage": "sft", "sft": {"template": "plain", "epochs": 2.0, "mtp": "detached"}}
    return config
