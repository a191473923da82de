"""`tiny`'s second phase of context extension: from 1,024 tokens to 2,048."""

from ml_collections import ConfigDict

from configs import tiny_1k


def get_config() -> ConfigDict:
    """Return 100 steps of one sequence of 2,048 tokens, which begin with the weights of `runs/tiny_1k`."""
    config = tiny_1k.get_config()
    config.name = "tiny_2k"
    config.data.sequence_length = 2048
    config.training.update(
        {"batch_size": (("constant", 1.0, 1),), "micro_batch_size": 1, "initial_weights": "runs/tiny_1k"}
    )
    return config
