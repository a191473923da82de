"""DeepSeek-V3 as MLPerf Training v6.0 trains it (mlcommons/training, llm_moe_pretraining/nemo, README of 2026).

Stated there: the 671B model with the tokenizer of Llama 3.1 8B, C4, sequences of 4,096, at least 15,360 of them a step
(16,384 in the reference), AdamW with 4 steps of warm-up to 2.4e-5 x sqrt(batch / 16,384), decay over 12,000 steps to
1e-8, evaluation after every step on the first 1,024 sequences of a fixed validation file until the loss is 3.60. The
reference used MTP and a micro-batch of one sequence on 256 GB300s.

The reference's script adds: a cosine with linear warm-up, a sequence-wise balance loss of 1e-2, eps 1e-8, no forced
balance. b1, b2, weight decay and clipping are those of the report. Not stated, and chosen here: the precision (FP8; the
rules leave it open), the weight of MTP (0.1), gamma of the biases (1e-3).

The model starts from a checkpoint that members of MLCommons alone may download: put its folder into
`training.initial_weights`, C4's files into `data.sources`, and the tokenizer's file into `data.tokenizer`. As it stands
a run starts from random weights on text of this machine: it shows the recipe at work, and its loss compares with none.
Evaluation takes 1,024 sequences of our own held-out split. (Llama 3.1's tokenizer has 256 special ids beyond the stated
vocabulary of 128,000.)

tests/training/test_mlperf.py runs two steps of it in miniature.
"""

from ml_collections import ConfigDict

from configs import deepseek_v3

BATCH = 16384  # of the reference; at least 15,360
PEAK = 2.4e-5  # times sqrt(batch / 16,384), rounded to nine decimals: another batch is another peak
WARMUP = 4  # steps
AFTER = 2.39959e-5  # of a cosine from the peak to 1e-8 at step 12,000, after 100 steps
LENGTH = 4096
STEPS = 100  # the most that the reference allows; it took 47


def get_config() -> ConfigDict:
    """Return the benchmark's model, recipe and batch, for at most 100 steps."""
    config = deepseek_v3.get_config()
    config.name = "mlperf_v6_deepseek_v3"
    config.model.vocab_size = 128000
    config.loss.mtp_weight = (("constant", 1.0, 0.1),)
    config.loss.sequence_balance_weight = 1e-2
    config.data.sequence_length = LENGTH
    config.data.update({"fim_rate": 0.0, "split_rate": 0.0})
    config.optimizer.update(
        {
            "learning_rate": (("constant", 0.01, PEAK), ("cosine", 1.0, AFTER)),
            "warmup_steps": WARMUP,
            "bias_update_rate": (("constant", 1.0, 1e-3),),
        }
    )
    config.training.update(
        {
            "num_tokens": float(STEPS * BATCH * LENGTH),
            "batch_size": (("constant", 1.0, BATCH),),
            "micro_batch_size": 256,
            "eval_every": 1,
            "eval_batches": 4,  # of 256 sequences: 1,024
        }
    )
    return config
