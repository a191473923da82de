"""The progress of a run, as a person sees it: a bar on a terminal, an occasional line elsewhere."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # where the output is not a terminal


class ProgressBar:
    """Progress in tokens, with ETA, tokens/s and loss."""

    def __init__(self, num_tokens: int, tokens_seen: int, file: TextIO | None = None, silent: bool = False):
        """Show progress from `tokens_seen` to `num_tokens` on `file` (standard error by default), unless `silent`."""
        self._file = file or sys.stderr
        self._silent = silent
        self._lines = silent or not self._file.isatty()
        self._bar = tqdm(
            total=num_tokens,
            initial=min(tokens_seen, num_tokens),
            desc="train",
            unit=" tokens",
            unit_scale=True,
            file=self._file,
            mininterval=0.5,
            dynamic_ncols=True,
            disable=self._lines,
        )
        self._num_tokens, self._tokens = num_tokens, tokens_seen
        # Time and tokens of the first call of `show`: compilation lies before it.
        self._start: tuple[float, int] | None = None
        self._last_line = 0.0

    def show(self, tokens_seen: int, step: int, loss: float) -> None:
        """Advance to `tokens_seen`."""
        if not self._lines:
            self._bar.set_postfix(step=step, loss=f"{loss:.3f}", refresh=False)
            self._bar.update(min(tokens_seen, self._num_tokens) - min(self._tokens, self._num_tokens))
        self._tokens = tokens_seen
        now = time.monotonic()
        self._start = self._start or (now, tokens_seen)
        if self._lines and (now - self._last_line >= SECONDS_BETWEEN_LINES or tokens_seen >= self._num_tokens):
            self._last_line = now
            self.note(self._line(step, loss, now))

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._silent:
            return
        if self._lines:
            print(text, file=self._file, flush=True)
        else:
            self._bar.write(text, file=self._file)

    def close(self) -> None:
        """Close the bar; it stays on the terminal as it stands."""
        self._bar.close()

    def _line(self, step: int, loss: float, now: float) -> str:
        line = f"train {100.0 * self._tokens / self._num_tokens:.1f}%  step {step}  loss {loss:.3f}"
        start, start_tokens = self._start
        if self._tokens == start_tokens:
            return line
        rate = (self._tokens - start_tokens) / (now - start)
        left = max(0, self._num_tokens - self._tokens) / rate
        return f"{line}  {rate:,.0f} tokens/s  ETA {tqdm.format_interval(left)}"
