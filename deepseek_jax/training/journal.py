"""The journal of a run: `log.txt` in its workdir has every line that a person saw, with the time; warnings too.

It is appended to whenever the run continues. Of several processes the first writes it. A bar that a terminal redraws is
not lines, so its state is noted now and then. If the disk is full, the journal misses lines and says nothing: the
checkpoints and metrics say it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from deepseek_jax import progress
from deepseek_jax.parallel import watch

FILE_NAME = "log.txt"
OWNER = "config.json"  # which a workdir has as soon as a run owns it; a refused start leaves no journal

_lines = progress.journal
_lines.setLevel(logging.INFO)
_lines.propagate = False
_lines.addHandler(logging.NullHandler())


class _File(logging.Handler):
    """Writes records into the journal; keeps warnings until the run says its first line and owns its workdir."""

    def __init__(self, workdir: Path):
        super().__init__(logging.INFO)
        self._workdir = workdir
        self._waiting: list[str] = []
        self._file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if not _is_first() or (record.levelno < logging.WARNING and record.name != _lines.name):
            return
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        with contextlib.suppress(OSError):
            text = record.getMessage().strip("\n")
            self._waiting += [f"{when}  {level}{line}\n" for line in text.split("\n")]
            if self._file is None:
                if record.name != _lines.name or not (self._workdir / OWNER).exists():
                    return
                self._file = (self._workdir / FILE_NAME).open("a", encoding="utf-8", errors="replace", buffering=1)
            lines, self._waiting = self._waiting, []
            self._file.writelines(lines)

    @property
    def is_open(self) -> bool:
        """Whether the run has said something: a start that is refused at the door leaves no line."""
        return self._file is not None

    def close(self) -> None:
        super().close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


@contextlib.contextmanager
def journal(workdir: Path) -> Iterator[None]:
    """Keep the journal of `workdir` for the time of the context, and note the error that ends it."""
    file = _File(Path(workdir))
    _lines.addHandler(file)
    warnings = logging.getLogger()
    warnings.addHandler(file)
    try:
        yield
    except Exception as error:
        if file.is_open:
            record(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        warnings.removeHandler(file)
        _lines.removeHandler(file)
        file.close()


def record(text: str) -> None:
    """Write a text that a person has seen into the journal, if there is one."""
    _lines.info("%s", text)


def say(text: str, show: Callable[[str], None] | None = None) -> None:
    """Show a text to the person who started the run, in the first of its processes, and write it into the journal."""
    if _is_first():
        show(text) if show else print(text, flush=True)
        record(text)


def _is_first() -> bool:
    """Return whether this is the first process of the run, without starting JAX's devices."""
    return (others := watch.of_this_process()) is None or others.index == 0
