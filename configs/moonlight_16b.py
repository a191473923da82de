"""Moonlight-16B-A3B (Moonshot AI, arXiv 2502.16982): V3's mathematics at the size of one node of eight GPUs.

The shape is that of the released `config.json`: V2-Lite's with V3's router, and no query latent, no groups, no MTP. The
recipe is V3's (AdamW, where the report has Muon; sequences of 4,096). Tokens, batch sizes and learning rate are, to our
knowledge, those of the report's main part; they were not compared with its text.
"""

from ml_collections import ConfigDict

from configs import deepseek_v3


def get_config() -> ConfigDict:
    """Return the shape and a recipe for eight GPUs in FP8, eight sequences a card.

    The state is 24 GiB a card of eight (`experiments.plan`). What selective recomputation keeps is about 7 GiB more per
    sequence of a card, by the sizes of the arrays; it was not measured. So this is for cards of 141 GB. Cards of 80 GB
    take `training.micro_batch_size = 32`, four sequences each, or `execution.remat = "full"`.
    """
    config = deepseek_v3.get_config()
    config.name = "moonlight_16b"
    config.model.update(
        {
            "vocab_size": 163840,
            "width": 2048,
            "num_layers": 27,
            "num_dense_layers": 1,
            "num_heads": 16,
            "query_latent": 0,
            "dense_hidden": 11264,
            "num_experts": 64,
            "num_shared_experts": 2,
            "experts_per_token": 6,
            "expert_hidden": 1408,
            "num_groups": 1,
            "num_kept_groups": 1,
            "routed_scale": 2.446,
            "num_mtp_layers": 0,
            "rope_base": 50000.0,
            "norm_eps": 1e-5,
            "init_std": 0.011,  # 0.006 at width 7168, scaled by 1 / sqrt(width)
        }
    )
    config.model.yarn.original_length = 8192
    config.optimizer.learning_rate = (("constant", 0.033 / 5.2, 4.2e-4), ("cosine", 1.0, 4.2e-5))
    ramp = (("constant", 0.2 / 5.2, 2048), ("constant", 1.0, 4096))
    config.training.update({"num_tokens": 5.2e12, "batch_size": ramp, "micro_batch_size": 64})
    config.mesh.update({"node": 1, "expert": 8})
    return config
