"""4.87B parameters, V3-shaped: the one shape of every comparison on a single GPU. No MTP, so that peers can run it
too.
"""

from ml_collections import ConfigDict

from configs import deepseek_v3


def get_config() -> ConfigDict:
    """Return the comparison variant: sequence 4096, eight sequences a step."""
    config = deepseek_v3.get_config()
    config.name = "v3_5b"
    config.model.update(
        {
            "vocab_size": 32768,
            "width": 2048,
            "num_layers": 12,
            "num_dense_layers": 1,
            "num_heads": 16,
            "dense_hidden": 8192,
            "num_experts": 64,
            "expert_hidden": 1024,
            "num_mtp_layers": 0,
            "init_std": 0.011,  # 0.006 at width 7168, scaled by 1 / sqrt(width)
        }
    )
    config.training.update({"num_tokens": 100e9, "batch_size": (("constant", 1.0, 8),), "micro_batch_size": 8})
    config.mesh.update({"node": 1, "expert": 1})
    config.execution.precision = "bf16"  # what every peer runs; "fp8" is one flag away
    config.execution.gather = "step"  # on one device nothing is split, and BF16 copies are made once per step
    config.execution.scan_unroll = 11  # all MoE layers: what they keep is not stacked, 16 GB less; 30 s more to compile
    return config
