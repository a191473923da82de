"""DeepSeek-V2-Lite, 16B: the smallest published shape of the family. No query latent, no groups, softmax gate without
renormalisation.
"""

from ml_collections import ConfigDict

from configs import deepseek_v2


def get_config() -> ConfigDict:
    """Return the V2-Lite shape and recipe."""
    config = deepseek_v2.get_config()
    config.name = "deepseek_v2_lite"
    config.model.update(
        {
            "width": 2048,
            "num_layers": 27,
            "num_heads": 16,
            "query_latent": 0,
            "dense_hidden": 10944,
            "num_experts": 64,
            "expert_hidden": 1408,
            "num_groups": 1,
            "num_kept_groups": 1,
            "routed_scale": 1.0,
        }
    )
    config.loss.sequence_balance_weight = 0.001
    config.optimizer.learning_rate = (
        ("constant", 0.8, 4.2e-4),
        ("constant", 0.9, 4.2e-4 * 0.316),
        ("constant", 1.0, 4.2e-4 * 0.316**2),
    )
    config.training.update({"num_tokens": 5.7e12, "batch_size": (("constant", 1.0, 4608),)})
    config.mesh.update({"node": 1, "expert": 8})
    return config
