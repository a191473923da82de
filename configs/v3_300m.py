"""0.3B parameters, V3-shaped and ready for FP8: small enough to train twice, which is how a precision is compared with
another.
"""

from ml_collections import ConfigDict

from configs import deepseek_v3


def get_config() -> ConfigDict:
    """Return a variant whose every linear dim is a multiple of 128: 2,000 steps of 32,768 tokens."""
    config = deepseek_v3.get_config()
    config.name = "v3_300m"
    config.model.update(
        {
            "vocab_size": 8192,
            "width": 1024,
            "num_layers": 8,
            "num_dense_layers": 1,
            "num_heads": 8,
            "query_latent": 512,
            "kv_latent": 256,
            "dense_hidden": 2816,
            "num_experts": 32,
            "experts_per_token": 4,
            "expert_hidden": 384,
            "num_groups": 4,
            "num_kept_groups": 2,
            "num_mtp_layers": 0,
            "init_std": 0.016,  # 0.006 at width 7168, scaled by 1 / sqrt(width)
        }
    )
    config.optimizer.learning_rate = (("constant", 0.5, 3e-4), ("cosine", 1.0, 3e-5))
    config.optimizer.warmup_steps = 200
    # twice the recipe's: 2,000 steps, not 200,000
    config.optimizer.bias_update_rate = (("constant", 0.9, 2e-3), ("constant", 1.0, 0.0))
    config.data.sequence_length = 1024
    config.data.fim_rate = 0.0
    config.data.split_rate = 0.0
    config.training.update(
        {"num_tokens": 2000 * 32768.0, "batch_size": (("constant", 1.0, 32),), "micro_batch_size": 32, "eval_every": 0}
    )
    config.mesh.update({"node": 1, "expert": 1})
    config.execution.update({"precision": "bf16", "gather": "step"})
    return config
