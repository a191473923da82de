"""`tiny`'s first phase of context extension, as V3's: from 256 tokens to 1,024 by YaRN."""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """Return 100 steps of two sequences of 1,024 tokens, which begin with the weights of `runs/tiny`."""
    config = tiny.get_config()
    config.name = "tiny_1k"
    # V3's factor is 1.25 times what both phases extend by
    config.model.yarn.update({"enabled": True, "factor": 10.0, "original_length": 256})
    config.optimizer.learning_rate = (("constant", 1.0, 3e-4),)  # the last of `tiny`
    config.optimizer.warmup_steps = 0
    config.optimizer.bias_update_rate = (("constant", 1.0, 0.0),)
    config.data.sequence_length = 1024
    config.training.update(
        {
            "num_tokens": 100 * 2048.0,
            "batch_size": (("constant", 1.0, 2),),
            "micro_batch_size": 2,
            "initial_weights": "runs/tiny",
        }
    )
    config.mesh.update({"data": 1, "context": -1})
    return config
