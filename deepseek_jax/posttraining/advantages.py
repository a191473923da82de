"""Rewards of groups of outputs to advantages: how much better an output is than the others of its prompt.

    A_i = (r_i - mean(r_1 .. r_G)) / (std(r_1 .. r_G) + 1e-6)      DeepSeek-V3, arXiv 2412.19437, eq. 28

The standard deviation is the unbiased one, as in the public trainers; the report does not say. A group whose rewards
are all equal has advantages of exactly 0, which no rounding of its mean changes. Advantages are computed in FP64.
"""

import numpy as np

from deepseek_jax.posttraining.choices import Choices

EPSILON = 1e-6  # DeepSeek's is unknown; trainers have 1e-4 to 1e-8


def advantages(rewards_PG: np.ndarray, scale: str) -> np.ndarray:
    """Return the advantages [P, G] of P groups of G outputs, FP32.

    Args:
        rewards_PG: any finite numbers.
        scale: "std" divides by the standard deviation of the group, "none" does not (Dr. GRPO).

    Raises:
        ValueError: groups of fewer than two outputs, or a reward that is not a finite number.
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {rewards_PG.shape}: an advantage compares an output with others of the same prompt; use"
            " groups of at least 2"
        )
    if len(wrong := np.argwhere(~np.isfinite(rewards_PG))):
        group, output = wrong[0].tolist()
        raise ValueError(
            f"the reward of output {output} of prompt {group} is {rewards_PG[group, output]}, and {len(wrong)} are not"
            " finite numbers; mend the reward, or let it return 0 for what it cannot judge"
        )
    above_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    if scale == "std":
        above_PG /= rewards_PG.std(1, ddof=1, keepdims=True) + EPSILON
    return np.where(is_flat(rewards_PG)[:, None], 0.0, above_PG).astype(np.float32)


def is_flat(rewards_PG: np.ndarray) -> np.ndarray:
    """Return which groups have no signal, bool [P]: their rewards are all equal."""
    return (rewards_PG == rewards_PG[:, :1]).all(1)


def punishment(choices: Choices, lengths: np.ndarray, limit: int) -> np.ndarray:
    """Return what is added to rewards for lengths in tokens: 0 to -1 (DAPO, arXiv 2503.14476, eq. 13).

    It is 0 up to `limit - overlong_buffer` tokens, then falls linearly to -1 at `limit`. Without "punish" it is 0.

    Raises:
        ValueError: the buffer is longer than the limit.
    """
    if choices.overlong != "punish":
        return np.zeros(np.shape(lengths))
    if choices.overlong_buffer > limit:
        raise ValueError(
            f"overlong_buffer = {choices.overlong_buffer} is more than the {limit} tokens that an output may have;"
            " lower it"
        )
    beyond = np.asarray(lengths, np.float64) - (limit - choices.overlong_buffer)
    return -np.clip(beyond / choices.overlong_buffer, 0.0, 1.0)
