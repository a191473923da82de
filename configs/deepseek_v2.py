"""DeepSeek-V2, 236B (arXiv 2405.04434); V2.5 has the same shape. Softmax gate, groups by their best expert, no bias, no
MTP.

The report's device-level and communication balance losses (0.05 and 0.02) are not here: they exist to balance its
hardware, not its experts.
"""

from ml_collections import ConfigDict

from configs import deepseek_v3


def get_config() -> ConfigDict:
    """Return the V2 shape and recipe."""
    config = deepseek_v3.get_config()
    config.name = "deepseek_v2"
    config.model.update(
        {
            "vocab_size": 102400,
            "width": 5120,
            "num_layers": 60,
            "num_dense_layers": 1,
            "dense_hidden": 12288,
            "num_experts": 160,
            "num_shared_experts": 2,
            "experts_per_token": 6,
            "expert_hidden": 1536,
            "num_kept_groups": 3,
            "gate": "softmax",
            "group_score": "max",
            "normalize_gates": False,
            "routed_scale": 16.0,
            "num_mtp_layers": 0,
        }
    )
    config.model.yarn.update({"mscale": 0.707, "mscale_all_dim": 0.707})  # the report's 0.0707 ln(s) + 1
    config.loss.update({"sequence_balance_weight": 0.003, "balance_frequency": "selected"})
    config.optimizer.update(
        {
            "learning_rate": (
                ("constant", 0.6, 2.4e-4),
                ("constant", 0.9, 2.4e-4 * 0.316),
                ("constant", 1.0, 2.4e-4 * 0.316**2),
            ),
            "bias_update_rate": (("constant", 1.0, 0.0),),
        }
    )
    config.data.update({"fim_rate": 0.0, "split_rate": 0.0})
    # over 225B tokens
    ramp = (("constant", 0.009, 2304), ("constant", 0.018, 4608), ("constant", 0.028, 6912), ("constant", 1.0, 9216))
    config.execution.precision = "bf16"  # FP8 came with V3
    config.training.update({"num_tokens": 8.1e12, "batch_size": ramp, "micro_batch_size": 128})
    # 160 experts on 32 devices, five on each: 64 do not divide them. It starts on 32, 64 and 128 devices.
    config.mesh.update({"node": 4, "expert": 8})
    return config
