"""DeepSeek-R1's final supervised fine-tuning of V3-Base (arXiv 2501.12948v2): 800K samples, 600K with reasoning.

Stated: two epochs, 5e-6 with a cosine to a tenth, batches of 64, a context of 32,768. What is unstated is as in
`deepseek_v3_sft`. R1's template opens every reply with `<think>` and drops the reasoning of earlier replies.
"""

from ml_collections import ConfigDict

from configs import deepseek_v3_sft


def get_config() -> ConfigDict:
    """Return V3's model with R1's fine-tuning."""
    config = deepseek_v3_sft.get_config()
    config.name = "deepseek_r1_sft"
    config.optimizer.learning_rate = (("constant", 1e-9, 5e-6), ("cosine", 1.0, 5e-7))
    config.data.sequence_length = 32768
    config.training.update({"batch_size": (("constant", 1.0, 64),), "micro_batch_size": 64})
    config.mesh.update({"data": 1, "context": -1})  # devices share the tokens of a row: docs/long_context.md
    config.posttraining.sft.template = "r1"
    return config
