"""A complete V3 for two CPU cores: every mechanism of the 671B model, 10M parameters, real text in three minutes."""

from ml_collections import ConfigDict

from configs import deepseek_v3


def get_config() -> ConfigDict:
    """Return the V3 recipe at the smallest shape on which all of it is visible."""
    config = deepseek_v3.get_config()
    config.name = "tiny"
    config.model.update(
        {
            "vocab_size": 4096,
            "width": 256,
            "num_layers": 4,
            "num_dense_layers": 1,
            "num_heads": 4,
            "query_latent": 128,
            "kv_latent": 64,
            "content_dim": 32,
            "rotary_dim": 16,
            "value_dim": 32,
            "dense_hidden": 768,
            "num_experts": 16,
            "experts_per_token": 4,
            "expert_hidden": 128,
            "num_groups": 4,
            "num_kept_groups": 2,
            # 0.006 at width 7168, scaled by 1 / sqrt(width), is 0.03; 0.04 learned faster than 0.02 in the first
            # million tokens.
            "init_std": 0.04,
            "residual_init_scale": 0.4,  # 0.02 bits per byte after a million tokens
        }
    )
    config.loss.mtp_weight = (("constant", 1.0, 0.3),)
    config.optimizer.learning_rate = (("constant", 0.1, 3e-3), ("cosine", 1.0, 3e-4))
    config.optimizer.warmup_steps = 20
    config.optimizer.b2 = 0.98  # batches of 2,048 tokens are noisy: 0.02 bits per byte against 0.95
    # ten times the recipe's: 500 steps, not 200,000
    config.optimizer.bias_update_rate = (("constant", 0.9, 1e-2), ("constant", 1.0, 0.0))
    config.data.sequence_length = 256
    config.data.fim_rate = 0.0  # 1M tokens are too few to learn a second format from
    config.data.split_rate = 0.0
    config.training.update(
        {
            "num_tokens": 1.0e6,
            "batch_size": (("constant", 1.0, 8),),
            "micro_batch_size": 8,
            "eval_every": 0,
            "eval_batches": 64,
            "checkpoint_every": 100,
        }
    )
    config.mesh.update({"node": 1, "expert": 1})
    config.execution.update(
        {
            "precision": "fp32",  # BF16 matmuls are emulated on CPUs
            "remat": "none",
            "scan_unroll": 4,
            "attention_chunk": 64,
            "gather": "step",
            "expert_block": 256,
            "expert_wave": 8,
            "loss_chunk": 512,
        }
    )
    return config
