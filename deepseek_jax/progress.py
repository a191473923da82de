"""Progress of long work, as a person sees it: a bar on a terminal, an occasional line elsewhere.

A log file keeps lines. A bar redraws itself with carriage returns, so in a file it would be one line of thousands of
characters.
"""

import logging
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # where the output is not a terminal
SECONDS_BETWEEN_RECORDS = 60.0  # of what a bar on a terminal shows

journal = logging.getLogger("deepseek_jax.journal")  # gets every line; `training.journal` keeps them


class Bar:
    """Counts from `done` to `total`, with the rate and the time left."""

    def __init__(
        self,
        total: int,
        label: str,
        unit: str = "B",
        done: int = 0,
        file: TextIO | None = None,
        silent: bool = False,
        patience: float = SECONDS_BETWEEN_LINES,
    ):
        """Show progress on `file` (standard error by default), unless `silent`.

        Args:
            total: of the units.
            label: what is being done, in a word.
            unit: what is counted; "B" are bytes.
            done: where the work starts.
            file: a terminal, or anything that takes lines.
            silent: show nothing, not even notes.
            patience: seconds before the first line; shorter work shows none.
        """
        self._file = file or sys.stderr
        self._silent = silent
        self.lines = silent or not self._file.isatty()  # instead of a bar
        self._bar = tqdm(
            total=total,
            initial=min(done, total),
            desc=label,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=True,
            file=self._file,
            mininterval=0.5,
            dynamic_ncols=True,
            disable=self.lines,
        )
        self._total, self._label, self._unit = total, label, unit
        self._done = done
        # Time and count of the first update: what is prepared lies before it, such as compilation.
        self._start: tuple[float, int] | None = None
        self._last_line = time.monotonic() - (SECONDS_BETWEEN_LINES - patience)
        self._shown = patience == 0.0

    def update(self, count: int, **values: str) -> None:
        """Count on by `count`; `values` are shown beside the progress."""
        before, self._done = self._done, self._done + count
        now = time.monotonic()
        self._start = self._start or (now, self._done)
        if not self.lines:
            if values:
                self._bar.set_postfix(values, refresh=False)
            self._bar.update(min(self._done, self._total) - min(before, self._total))
            if now - self._last_line >= SECONDS_BETWEEN_RECORDS:
                self._last_line = now
                journal.info("%s", self._line(now, values))
            return
        complete = self._done >= self._total > before
        if now - self._last_line >= SECONDS_BETWEEN_LINES or (complete and self._shown):
            self._last_line, self._shown = now, True
            self.note(self._line(now, values))

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._silent:
            return
        journal.info("%s", text)
        if self.lines:
            print(text, file=self._file, flush=True)
        else:
            self._bar.write(text, file=self._file)

    def close(self) -> None:
        """Close the bar; it stays on the terminal as it stands."""
        self._bar.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def _line(self, now: float, values: dict[str, str]) -> str:
        share = min(100.0, 100.0 * self._done / max(1, self._total))  # the last step may exceed the total
        parts = [f"{self._label} {share:.1f}%", *(f"{name} {value}" for name, value in values.items())]
        start, start_done = self._start
        if self._done > start_done and now > start:
            rate = (self._done - start_done) / (now - start)
            left = max(0, self._total - self._done) / rate
            speed = f"{rate / 1e6:,.1f} MB/s" if self._unit == "B" else f"{rate:,.0f} {self._unit}/s"
            parts += [speed, f"ETA {tqdm.format_interval(left)}"]
        return "  ".join(parts)
