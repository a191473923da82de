"""DeepSeek-V3's second phase of context extension: from 32K to 128K (arXiv 2412.19437, section 4.3)."""

from ml_collections import ConfigDict

from configs import deepseek_v3_32k


def get_config() -> ConfigDict:
    """Return 1,000 steps of 480 sequences of 131,072 tokens, which begin with the weights of the first phase."""
    config = deepseek_v3_32k.get_config()
    config.name = "deepseek_v3_128k"
    config.data.sequence_length = 131072
    config.training.update(
        {
            "num_tokens": 1000 * 480 * 131072.0,
            "batch_size": (("constant", 1.0, 480),),
            "micro_batch_size": 32,
            "initial_weights": "runs/deepseek_v3_32k",
        }
    )
    config.mesh.node = 4  # 480 sequences are no multiple of 64; 1,024 devices: 32 share the tokens of one sequence
    return config
