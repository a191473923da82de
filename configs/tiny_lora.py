"""Adapters on `tiny` from conversations of your own; the model stays as it is (docs/posttraining.md).

    python -m experiments.posttrain --config=configs/tiny_lora.py --initial=runs/tiny@STEP --workdir=runs/tiny_lora \
        --config.data.sources=chats.jsonl
"""

from ml_collections import ConfigDict

from configs import tiny_sft


def get_config() -> ConfigDict:
    """Return the fine-tuning of `tiny` with adapters of rank 8 beside attention, all feed-forwards and experts."""
    config = tiny_sft.get_config()
    config.name = "tiny_lora"
    # ten times that of all weights (Thinking Machines, "LoRA Without Regret", 2025)
    config.optimizer.learning_rate = (("constant", 1e-9, 3e-3), ("cosine", 1.0, 6e-4))
    config.posttraining.sft.mtp = "off"  # MTP layers have no adapters
    config.posttraining.lora = {
        "rank": 8,
        "alpha": 16.0,
        "targets": ("attention", "ffn", "shared", "experts"),
        "initial": "",  # or "workdir@step" of a run of adapters
    }
    return config
