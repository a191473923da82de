"""R1's stages for two CPU cores, from nothing: `make r1`, or `python -m experiments.r1 --workdir=runs/r1` (docs/r1.md).

    cold_start    fine-tuning of random weights on conversations that show the way
    reasoning     GRPO with a reward for right answers
    samples       many answers of the result, of which the right ones are kept
    second_sft    fine-tuning of the cold start's weights on them
    second_rl     GRPO with rewards for right answers and for the form

`--config.r1.num_stages=2` ends behind `reasoning`. `--config=configs/tiny_r1.py:chance` is the control: reinforcement
learning with a reward that knows nothing (`posttraining.rewards.chance`). `--config=configs/tiny_r1.py:distill`
teaches a model of a seventh of the parameters, behind the first three stages:

    small_sft         fine-tuning of random weights of it on the samples
    small_both        and then on-policy distillation by reverse KL, from `reasoning`
    small_cold        the cold start of it: begin of both that follow
    small_on_policy   on-policy distillation alone
    small_grpo        the control: GRPO alone, without a teacher
"""

from ml_collections import ConfigDict

from configs import tiny

TASK = "sort_digits:4-5"
MAX_NEW_TOKENS = 42  # the longest right answer has 37
GRPO = {
    "variant": "grpo",
    "overrides": {"kl_weight": 0.001},  # R1's
    "template": "folder",
    "problems": TASK,
    "num_problems": 2000,
    "heldout": 200,
    "rewards": {"text": 1.0},
    "accuracy": "text",
    "on_failure": "stop",
    "reward_seconds": 30.0,
    "reward_workers": 1,
    "group_size": 16,
    "updates": 1,
    "steps": 30,
    "max_new_tokens": MAX_NEW_TOKENS,
    "rows": 256,
}
FINE_TUNING = {
    "optimizer.learning_rate": (("constant", 0.5, 3e-3), ("cosine", 1.0, 3e-4)),
    "optimizer.warmup_steps": 20,
    "training.batch_size": (("constant", 1.0, 16),),
    "training.micro_batch_size": 16,
}
REINFORCEMENT = {
    "optimizer.learning_rate": (("constant", 1.0, 1e-4),),
    "optimizer.warmup_steps": 5,
    "training.batch_size": (("constant", 1.0, 256),),
    "training.micro_batch_size": 256,
    "training.eval_every": 20,
}
STAGES = (
    {
        "name": "cold_start",
        "kind": "sft",
        "initial": "random",
        "changes": FINE_TUNING,
        "settings": {"template": "plain", "epochs": 4.0, "mtp": "off"},
    },
    {"name": "reasoning", "kind": "grpo", "initial": "cold_start", "changes": REINFORCEMENT, "settings": GRPO},
    {
        "name": "samples",
        "kind": "samples",
        "initial": "reasoning",
        "changes": {},
        "settings": {"prompts": 1500, "samples": 2, "temperature": 1.0},
    },
    {
        "name": "second_sft",
        "kind": "sft",
        "initial": "cold_start",
        "data": "samples",
        "changes": FINE_TUNING,
        "settings": {"template": "folder", "epochs": 1.0, "mtp": "off"},
    },
    {
        "name": "second_rl",
        "kind": "grpo",
        "initial": "second_sft",
        "changes": REINFORCEMENT,
        "settings": GRPO | {"rewards": {"text": 1.0, "format": 0.1}, "steps": 20},
    },
)
SMALL = {
    "model.width": 64,
    "model.num_layers": 2,
    "model.query_latent": 32,
    "model.kv_latent": 32,
    "model.dense_hidden": 128,
    "model.num_experts": 4,
    "model.expert_hidden": 64,
}
TAUGHT = {name: value for name, value in GRPO.items() if name in ("template", "problems", "num_problems", "heldout")}
TAUGHT |= {"teacher": "reasoning", "accuracy": "text", "group_size": 2, "steps": 30, "max_new_tokens": MAX_NEW_TOKENS}
TAUGHT |= {"rows": 256}
COPIES = {"optimizer.learning_rate": (("constant", 1.0, 3e-4),)}  # at 1e-3 the divergence grows (experiments/log.md)
SMALL_STAGES = (
    STAGES[0] | {"name": "small_sft", "data": "samples", "changes": FINE_TUNING | SMALL},
    {
        "name": "small_both",
        "kind": "distillation",
        "initial": "small_sft",
        "changes": REINFORCEMENT | COPIES | SMALL,
        "settings": TAUGHT,
    },
    STAGES[0] | {"name": "small_cold", "changes": FINE_TUNING | SMALL},
    {
        "name": "small_on_policy",
        "kind": "distillation",
        "initial": "small_cold",
        "changes": REINFORCEMENT | COPIES | SMALL,
        "settings": TAUGHT,
    },
    STAGES[1] | {"name": "small_grpo", "initial": "small_cold", "changes": REINFORCEMENT | SMALL},
)
DISTILL = "distill"


def get_config(variant: str = "text") -> ConfigDict:
    """Return V3's mechanisms at width 128, what all stages share, and the stages.

    `variant` is the reward that GRPO maximises, or "distill".
    """
    config = tiny.get_config()
    config.name = "tiny_r1"
    config.model.update(
        {
            "vocab_size": 320,  # bytes, and the words between the digits
            "width": 128,
            "num_layers": 3,
            "query_latent": 64,
            "dense_hidden": 256,
            "num_experts": 8,
            "experts_per_token": 2,
            "num_groups": 1,
            "num_kept_groups": 1,
            "num_mtp_layers": 0,
        }
    )
    config.loss.update({"sequence_balance_weight": 0.0, "mtp_weight": (("constant", 1.0, 0.0),)})
    config.optimizer.update({"weight_decay": 0.0, "bias_update_rate": (("constant", 1.0, 0.0),)})  # frozen biases
    config.data.update(
        {
            "tokenizer": "bpe",
            "text_field": "messages",
            "sequence_length": 64,
            "heldout_fraction": 0.0,  # accuracy is what is measured
            "mask_documents": True,
            "reset_positions": True,
        }
    )
    config.training.update({"num_tokens": 1e12, "eval_every": 0, "log_every": 1, "checkpoint_every": 20})
    config.execution.update({"expert_block": 64, "scan_unroll": 1})
    stages = STAGES
    if variant != "text":
        config.name = f"tiny_r1_{variant}"
    if variant == DISTILL:
        stages = STAGES[:3] + SMALL_STAGES
    elif variant != "text":
        settings = GRPO | {"rewards": {"text": 0.0, variant: 1.0}}  # the answer is measured, and gives nothing
        stages = (STAGES[0], STAGES[1] | {"settings": settings})
    config.r1 = {"task": TASK, "examples": 2000, "hasty": 4000, "num_stages": len(stages), "stages": stages}
    return config
