"""How many tokens a request used, as OpenAI's API says it."""

from typing import Any

from deepseek_jax.inference.job import Usage


class UsageSum:
    """The usage of all texts of a request; of several choices the prompt counts once."""

    def __init__(self, num_choices: int):
        """Start with nothing; jobs are numbered with a prompt's choices beside each other."""
        self._num_choices = num_choices
        self._by_job: dict[int, Usage] = {}

    def note(self, number: int, usage: Usage) -> None:
        """Keep the newest usage of a job."""
        self._by_job[number] = usage

    def sums(self) -> Usage:
        """Return the sums."""
        firsts = [usage for number, usage in self._by_job.items() if number % self._num_choices == 0]
        rest = (sum(getattr(usage, name) for usage in self._by_job.values()) for name in Usage._fields[2:])
        return Usage(sum(u.prompt_tokens for u in firsts), sum(u.cached_tokens for u in firsts), *rest)

    def body(self) -> dict[str, Any]:
        """Return the JSON of an answer's `usage`."""
        sums = self.sums()
        return {
            "prompt_tokens": sums.prompt_tokens,
            "completion_tokens": sums.completion_tokens,
            "total_tokens": sums.prompt_tokens + sums.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sums.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sums.accepted_tokens,
                "rejected_prediction_tokens": sums.drafted_tokens - sums.accepted_tokens,
            },
        }
