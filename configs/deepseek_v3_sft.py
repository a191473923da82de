"""DeepSeek-V3's supervised fine-tuning (arXiv 2412.19437, section 5.1): 1.5M instances, two epochs.

Stated: two epochs, cosine from 5e-6 to 1e-6, sequences packed from several samples that do not see each other. Batch
size, length, warm-up, weight decay, which tokens carry loss, MTP and router bias are unstated; our choice is beside
each.
"""

from ml_collections import ConfigDict

from configs import deepseek_v3


def get_config() -> ConfigDict:
    """Return V3's model with its fine-tuning."""
    config = deepseek_v3.get_config()
    config.name = "deepseek_v3_sft"
    config.model.yarn.enabled = True  # it begins with the weights of the context extension
    config.loss.mtp_weight = (("constant", 1.0, 0.1),)  # unstated; the last of pre-training
    config.loss.sequence_balance_weight = 0.0  # unstated; the bias is frozen, and packing then changes no loss
    config.optimizer.update(
        {
            "learning_rate": (("constant", 1e-9, 5e-6), ("cosine", 1.0, 1e-6)),
            "warmup_steps": 0,  # none is stated
            "weight_decay": 0.0,  # unstated; two epochs at 5e-6 would decay by a few millionths
            "bias_update_rate": (("constant", 1.0, 0.0),),  # unstated; frozen, as at the end of pre-training
        }
    )
    config.data.update(
        {
            "sources": ({"path": "chats.jsonl"},),
            "text_field": "messages",
            "sequence_length": 8192,  # unstated
            "heldout_fraction": 0.005,
            "fim_rate": 0.0,
            "split_rate": 0.0,
            "mask_documents": True,
            "reset_positions": True,
        }
    )
    config.training.update(
        {
            "num_tokens": 1e15,  # the epochs end the run
            "batch_size": (("constant", 1.0, 512),),  # unstated
            "micro_batch_size": 64,
            "eval_every": 100,
            "checkpoint_every": 100,
        }
    )
    config.posttraining = {"stage": "sft", "sft": {"template": "v3", "epochs": 2.0, "mtp": "detached"}}
    return config
