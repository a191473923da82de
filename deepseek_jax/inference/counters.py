"""What an engine has done since its start."""

from deepseek_jax.inference.job import CANCELLED, DEADLINE, ERROR, LENGTH, STOP


class Counters:
    """What the engine has done so far."""

    def __init__(self, num_drafts: int):
        """Begin at 0."""
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = self.num_steps = 0
        self.finished: dict[str, int] = dict.fromkeys((STOP, LENGTH, CANCELLED, DEADLINE, ERROR), 0)
        self.drafted, self.accepted = [0] * num_drafts, [0] * num_drafts

    def begin(self, num_prompt: int, num_cached: int) -> None:
        """Count a prompt."""
        self.prompt_tokens += num_prompt
        self.cached_tokens += num_cached

    def add(self, num_tokens: int) -> None:
        """Count tokens of texts."""
        self.completion_tokens += num_tokens

    def end(self, reason: str) -> None:
        """Count a job that has ended."""
        self.finished[reason] += 1

    def draft(self, drafted: int, accepted: int) -> None:
        """Count a verification, by position: all that were drafted, and the first `accepted` of them."""
        for i in range(drafted):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted

    def step(self) -> None:
        """Count a step."""
        self.num_steps += 1
