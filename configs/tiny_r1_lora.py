"""R1's stage `reasoning` (configs/tiny_r1.py) by adapters on the cold start, which stays as it is (docs/grpo.md).

    python -m experiments.r1 --workdir=runs/r1 --config.r1.num_stages=1
    python -m experiments.posttrain --config=configs/tiny_r1_lora.py --initial=runs/r1/cold_start@STEP \
        --workdir=runs/r1_lora
"""

from ml_collections import ConfigDict

from configs import tiny_r1


def get_config() -> ConfigDict:
    """Return the stage with adapters of rank 8 beside attention, all feed-forwards and experts."""
    config = tiny_r1.get_config()
    del config["r1"]
    config.name = "tiny_r1_lora"
    for path, value in tiny_r1.REINFORCEMENT.items():
        section, key = path.split(".")
        config[section][key] = value
    # ten times that of all weights, as in tiny_lora
    config.optimizer.learning_rate = (("constant", 1.0, 1e-3),)
    config.posttraining = {
        "stage": "grpo",
        "grpo": tiny_r1.GRPO,
        "lora": {
            "rank": 8,
            "alpha": 16.0,
            "targets": ("attention", "ffn", "shared", "experts"),
            "initial": "",  # or "workdir@step" of a run of adapters
        },
    }
    return config
