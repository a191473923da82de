"""DeepSeek-V3's first phase of context extension: from 4K to 32K by YaRN (arXiv 2412.19437, section 4.3)."""

from ml_collections import ConfigDict

from configs import deepseek_v3


def get_config() -> ConfigDict:
    """Return 1,000 steps of 1,920 sequences of 32,768 tokens, which begin with the weights of the pre-training."""
    config = deepseek_v3.get_config()
    config.name = "deepseek_v3_32k"
    config.model.yarn.enabled = True  # factor 40 over 4,096 in both phases
    # Unstated for the extension phases: MTP's weight and the bias update rate stay at the last of the pre-training.
    config.loss.mtp_weight = (("constant", 1.0, 0.1),)
    config.optimizer.bias_update_rate = (("constant", 1.0, 0.0),)
    # the last of the pre-training; the report states no warm-up
    config.optimizer.learning_rate = (("constant", 1.0, 7.3e-6),)
    config.optimizer.warmup_steps = 0
    config.data.sequence_length = 32768
    config.training.update(
        {
            "num_tokens": 1000 * 1920 * 32768.0,  # 62.9B, on top of the 14.8T
            "batch_size": (("constant", 1.0, 1920),),
            "micro_batch_size": 128,
            "eval_every": 100,
            "eval_batches": 8,
            "checkpoint_every": 100,
            "initial_weights": "runs/deepseek_v3",  # the workdir of the pre-training; or another, or a checkpoint
        }
    )
    # 1,024 devices: 16 share the tokens of two sequences, 4,096 for each; docs/long_context.md
    config.mesh.update({"data": 1, "context": -1})
    return config
