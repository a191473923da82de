"""What a run of GRPO writes into `metrics.jsonl` beside what every run does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.inference.job import LENGTH
from deepseek_jax.posttraining.advantages import is_flat
from deepseek_jax.posttraining.choices import Choices
from deepseek_jax.posttraining.grpo_settings import MODEL
from deepseek_jax.posttraining.rewards import NAMES
from deepseek_jax.posttraining.rewards.problem import Score
from deepseek_jax.posttraining.rollouts import Sample
from deepseek_jax.training.metrics import KEYS, update_row
from deepseek_jax.training.optimizer import Rates

POLICY_KEYS = KEYS | {
    "policy/loss": "GRPO's loss (`posttraining.policy_objective`); its value says little, its gradient is the update",
    "policy/kl": "estimate of KL to the reference, nats per token; absent without one",
    "policy/entropy": "minus the mean log-probability of the drawn tokens, nats",
    "policy/old_kl": "mean of log old - log new, nats per token: 0 in the first update of a rollout",
    "policy/ratio_mean": "of new to old probability, over tokens",
    "policy/ratio_std": "of new to old probability, over tokens",
    "policy/clip_low": "share of tokens whose ratio is below the interval",
    "policy/clip_high": "share of tokens whose ratio is above the interval",
    "policy/tis_mean": "mean weight for trainer over sampler; absent without such weights",
    "policy/tis_capped": "share of tokens at the cap; absent without such weights",
    "policy/outputs": "of this update that carry loss",
    "policy/tokens": "of this update that carry loss",
    "policy/staleness": "updates that the weights which sampled are behind those that are updated",
    "rollout/reward": "mean of the weighted sums, with the punishment of length",
    "rollout/reward_std": "mean of the standard deviations within groups",
    **{f"rollout/reward_{name}": f"mean of the reward {name!r}, without its weight" for name in (*NAMES, MODEL)},
    "rollout/accuracy": "share of outputs that the reward of accuracy gives 1",
    "rollout/flat_groups": "share of groups whose rewards are all equal",
    "rollout/failed": "rewards that failed and count 0",
    "rollout/length": "mean tokens of an output, EOS included",
    "rollout/cut_off": "share of outputs that ended at the limit",
    "rollout/sampler_difference": (
        "mean difference of sampler's and trainer's log-probabilities, nats, over tokens that carry loss"
    ),
    "rollout/sampler_difference_max": "the largest",
    "rollout/route_flips": "share of choices of experts, by token and layer, that sampler and trainer make differently",
    "rollout/version": "updates that the weights which sampled have had",
    "rollout/first_prompt": "number of the rollout's first prompt in the run",
    "rollout/waited": "seconds that the trainer waited for samples since the update before",
    "rollout/seconds": "sampling, rewards and scores of this rollout",
    "rollout/tokens_per_second": "drawn tokens over the time of sampling",
    "eval/accuracy": "share of held-out problems that greedy outputs answer right",
    "eval/accuracy_low": "lower end of Wilson's 95% interval",
    "eval/accuracy_high": "upper end of Wilson's 95% interval",
    "eval/problems": "held-out problems",
    "eval/length": "mean tokens of a held-out output, EOS included",
    "eval/cut_off": "share of held-out outputs that ended at the limit",
}
ALWAYS = "loss", "entropy", "old_kl", "ratio_mean", "ratio_std", "clip_low", "clip_high", "outputs", "tokens"


def rollout_row(
    samples: Sequence[Sample],
    scores: Sequence[Score],
    rewards_PG: np.ndarray,
    batch: dict[str, np.ndarray],
    seconds: dict[str, float],
    accuracy: str,
    route_flips: float,
) -> dict[str, Any]:
    """Return the keys `rollout/...` of one rollout, plain numbers.

    Args:
        samples: group after group.
        scores: of the samples.
        rewards_PG: totals with the punishment of length.
        batch: with `sampler_logprobs_BS` and `old_logprobs_BS`.
        seconds: of "sampling", and of the whole "rollout".
        accuracy: the reward that is 1 for a right answer.
        route_flips: of the scores (`scoring.flipped`).
    """
    lengths = np.array([len(sample.ids) for sample in samples])
    carries = batch["loss_weights_BS"] > 0
    apart = np.abs(batch["sampler_logprobs_BS"] - batch["old_logprobs_BS"])[carries]
    row = {
        "rollout/reward": rewards_PG.mean(),
        "rollout/reward_std": rewards_PG.std(1, ddof=1).mean(),
        **{f"rollout/reward_{name}": np.mean([score.parts[name] for score in scores]) for name in scores[0].parts},
        "rollout/accuracy": np.mean([score.parts[accuracy] == 1.0 for score in scores]),
        "rollout/flat_groups": is_flat(rewards_PG).mean(),
        "rollout/failed": sum(len(score.failed) for score in scores),
        "rollout/length": lengths.mean(),
        "rollout/cut_off": np.mean([sample.finish_reason == LENGTH for sample in samples]),
        "rollout/sampler_difference": apart.mean() if apart.size else 0.0,
        "rollout/sampler_difference_max": apart.max() if apart.size else 0.0,
        "rollout/route_flips": route_flips,
        "rollout/version": min(sample.version for sample in samples),
        "rollout/first_prompt": samples[0].number,
        "rollout/seconds": seconds["rollout"],
        "rollout/tokens_per_second": lengths.sum() / seconds["sampling"],
    }
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}


def policy_row(choices: Choices, metrics: dict[str, np.ndarray], rates: Rates) -> dict[str, Any]:
    """Return the keys of an update, from the step's metrics on the host."""
    names = [*ALWAYS, *(["kl"] if choices.kl_weight else []), *(["tis_mean", "tis_capped"] if choices.tis_cap else [])]
    return {f"policy/{name}": metrics[name] for name in names} | update_row(metrics, rates)
