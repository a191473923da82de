"""The smallest V3 with every mechanism, on a folder of text: `--config=tests/training/nano.py:<folder>`."""

from ml_collections import ConfigDict

from configs import tiny


def get_config(corpus: str) -> ConfigDict:
    """Return the configuration of 60 steps of 8 x 32 tokens with a checkpoint every 5."""
    config = tiny.get_config()
    config.name = "nano"
    config.model.update(
        {
            "vocab_size": 262,
            "width": 32,
            "num_layers": 2,
            "num_heads": 2,
            "query_latent": 16,
            "kv_latent": 16,
            "content_dim": 8,
            "rotary_dim": 4,
            "value_dim": 8,
            "dense_hidden": 32,
            "num_experts": 8,
            "experts_per_token": 2,
            "expert_hidden": 16,
        }
    )
    config.optimizer.warmup_steps = 5
    config.data.update(
        {
            "sources": ({"path": corpus, "weight": 1.0},),
            "tokenizer": "byte",
            "sequence_length": 32,
            "heldout_fraction": 0.2,
        }
    )
    config.training.update(
        {"num_tokens": 60 * 8 * 32, "eval_every": 20, "eval_batches": 2, "checkpoint_every": 5, "keep_checkpoints": 2}
    )
    config.execution.update(
        {"expert_block": 8, "expert_wave": 8, "loss_chunk": 64, "attention_chunk": 32, "scan_unroll": 1}
    )
    return config
