"""The progress of a run: tokens, step and loss."""

from typing import TextIO

from deepseek_jax.progress import Bar


class ProgressBar:
    """Progress in tokens, with ETA, tokens/s and loss."""

    def __init__(self, num_tokens: int, tokens_seen: int, file: TextIO | None = None, silent: bool = False):
        """Show progress from `tokens_seen` to `num_tokens` on `file` (standard error by default), unless `silent`."""
        self._bar = Bar(num_tokens, "train", "tokens", tokens_seen, file, silent, patience=0.0)
        self._tokens = tokens_seen

    def show(self, tokens_seen: int, step: int, loss: float) -> None:
        """Advance to `tokens_seen`."""
        self._bar.update(tokens_seen - self._tokens, step=str(step), loss=f"{loss:.3f}")
        self._tokens = tokens_seen

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self._bar.note(text)

    def close(self) -> None:
        """Close the bar; it stays on the terminal as it stands."""
        self._bar.close()
