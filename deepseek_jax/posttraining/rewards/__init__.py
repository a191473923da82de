"""How good a completion is, by rules: mathematics, code that passes tests, format, language. None of it imports JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepseek_jax.posttraining.rewards.problem import Reward


NAMES = ("mathematics", "gsm8k", "text", "format", "language", "chance", "code")
MATHEMATICAL = "mathematics", "gsm8k"  # compare values (`rewards.mathematics`)
# The field of a `Problem` that a reward cannot do without.
NEEDS = {"mathematics": "answer", "gsm8k": "answer", "text": "answer", "language": "language", "code": "tests"}


def rewards_by_name(names: Sequence[str]) -> dict[str, Reward]:
    """Return rewards by the names that a config has for them.

    Raises:
        ValueError: a name that is none of `NAMES`, twice the same, or none at all.
        SandboxError: "code" on a machine that cannot run foreign code safely.
    """
    # Here, as a sandbox imports this package, and starts once per completion.
    from deepseek_jax.posttraining.rewards.chance import chance_reward
    from deepseek_jax.posttraining.rewards.code import CodeReward
    from deepseek_jax.posttraining.rewards.format import format_reward, text_reward
    from deepseek_jax.posttraining.rewards.language import language_reward
    from deepseek_jax.posttraining.rewards.mathematics import gsm8k_reward, mathematics_reward

    if not names or len(set(names)) < len(names) or not set(names) <= set(NAMES):
        raise ValueError(f"rewards are {list(names)}: each once, of {NAMES}")
    functions: dict[str, Reward] = {
        "mathematics": mathematics_reward,
        "gsm8k": gsm8k_reward,
        "text": text_reward,
        "format": format_reward,
        "language": language_reward,
        "chance": chance_reward,
    }
    return {name: CodeReward() if name == "code" else functions[name] for name in names}
