"""The front door of every command: `run` parses the command line, calls `main`, and ends with a line and an exit code.

    0           done
    2           the command line, a configuration or a file cannot be used: one message with the value and the remedy
    1           the run failed: a save, a disk, memory, losses that are not finite. One message too
    1           anything else is a fault of ours, and comes with its whole call stack
    130, 143    after Ctrl-C and SIGTERM; 129, 138 after SIGHUP and SIGUSR1 in a training

`--traceback` shows the call stack of every error. `--help` shows the flags of this project, `--helpfull` those of all
libraries beneath.
"""

import difflib
import logging as python_logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from deepseek_jax.inputs import printable, printable_lines, shown
from deepseek_jax.storage import remedy
from experiments import accelerator, recipe

TRACEBACK = flags.DEFINE_bool("traceback", False, "After an error, show the call stack too.")

ROOT = Path(__file__).parents[1]
UNUSABLE, FAILED = 2, 1
MOST_LINES = 3  # of a message
MOST_ASKED = 300  # characters of what was asked for
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|std::bad_alloc")
WIDTH = 100  # of the help
MISSING = re.compile(r"(?s)flag --(?P<name>[\w.]+)=None: Flag --\S+ must have a value other than None.*")
WRONG_VALUE = re.compile(r"(?s)flag --(?P<name>[\w.]+)=(?P<value>.*?): (?P<why>.*)")


def run(main: Callable[[list[str]], None], words: Sequence[str] = ()) -> NoReturn:
    """Parse the command line, call `main` with it, and exit.

    Args:
        main: takes the command line without its flags: the name of the program and, with `words`, one of them.
        words: what the command can do, if it asks for one of several.
    """
    name = getattr(sys.modules["__main__"].__spec__, "name", None) or main.__module__
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may not exist here, and no command opens a window
    accelerator.choose()
    try:
        main(parse(sys.argv, main, words))
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(FAILED)
    except Exception as error:
        sys.exit(report(name, error))
    sys.exit(0)


def report(name: str, error: Exception) -> int:
    """Print the message of an error, or its whole call stack; return the exit code."""
    code, text = outcome(error)
    if text is None or "--traceback" in sys.argv:
        stack = "".join(traceback.format_exception(error))
        print("\n".join(map(printable, stack.splitlines())), file=sys.stderr)
    if text is not None:
        text = "\n".join([text, *getattr(error, "__notes__", [])])
        hint = "; --traceback shows where" if code == UNUSABLE and _from_a_library(error) else ""
        print(f"{name}: {message(text)}{hint}", file=sys.stderr)
    sys.stderr.flush()
    return code


def _from_a_library(error: Exception) -> bool:
    """Return whether code that is not ours raised the error: then it may be a fault of ours after all."""
    *_, frame = [None, *(frame for frame, _ in traceback.walk_tb(error.__traceback__))]
    return frame is not None and not Path(frame.f_code.co_filename).is_relative_to(ROOT)


def outcome(error: Exception) -> tuple[int, str | None]:
    """Return the exit code of an error and its message, or None for a fault of ours."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, ValueError | NotImplementedError | app.UsageError):
        return UNUSABLE, text
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        return FAILED, _out_of_memory(text, isinstance(error, MemoryError))
    if isinstance(error, OSError):
        where = f": {shown(os.fsdecode(error.filename))}" if isinstance(error.filename, str | bytes) else ""
        reason = error.strerror or text
        if ";" in reason:  # with a remedy of its own
            return FAILED, reason
        folder = Path(os.fsdecode(error.filename) if where else os.curdir).parent
        return FAILED, f"the operating system refused ({reason}{where}); {remedy(error, folder)}"
    # By name: beside them is JAX.
    if type(error).__name__ in ("SaveError", "NonFiniteError", "ProcessError", "RewardError"):
        return FAILED, text
    return FAILED, None


def _out_of_memory(text: str, is_host: bool) -> str:
    """Return one line for XLA's many: what was asked for, what there is, what to lower."""
    asked = next(line for line in text.splitlines() if line.strip())
    if found := OUT_OF_MEMORY.search(text):
        asked = next(line for line in text[found.start() :].splitlines() if line.strip())
    there = _memory(is_host)
    has = f"; {'this machine' if is_host else 'a device here'} has {there / 2**30:,.1f} GiB" if there else ""
    return (
        f"out of memory ({shown(asked.strip())[:MOST_ASKED]}{has}); lower training.micro_batch_size or"
        " data.sequence_length, set execution.remat = 'full', or use more devices: experiments.plan says what a step"
        " needs"
    )


def _memory(is_host: bool) -> int | None:
    """Return the bytes of a device, or of this machine, also if the device is its CPU; None if unknown."""
    try:
        asked = not is_host and "jax" in sys.modules  # a program of JAX failed, so JAX runs
        statistics = sys.modules["jax"].local_devices()[0].memory_stats() if asked else None
        return (statistics or {}).get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (RuntimeError, ValueError, OSError):
        return None


def message(text: str) -> str:
    """Return a message in at most `MOST_LINES` lines, whole, with the control characters escaped."""
    lines = [printable(line.strip()) for line in text.splitlines() if line.strip()]
    if len(lines) <= MOST_LINES:
        return "\n".join(lines)
    head = lines[0] if lines[0].endswith(":") else f"{lines[0]};"
    return f"{head} {'; '.join(lines[1:])}"


def parse(argv: list[str], main: Callable, words: Sequence[str] = ()) -> list[str]:
    """Parse the flags; return the command line without them.

    Raises:
        ValueError: a flag is unknown, missing or wrong, a word stands without "--", or the configuration is unusable.
    """
    logging.use_absl_handler()
    tell_plainly()
    app.define_help_flags()
    if {"--help", "-help", "--helpshort", "-h", "-?"} & set(argv):
        print(usage(main))
        sys.exit(0)
    try:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        if "config" in flags.FLAGS:
            argv = recipe.take_overrides(argv)
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise ValueError(f"--{shown(error.flagname)} is unknown; {_nearest(error.flagname)}") from error
    except flags.Error as error:
        raise ValueError(_wrong_value(str(error))) from error
    if words and (len(rest) != 2 or rest[1] not in words):
        raise ValueError(f"give one of {', '.join(words)}, not {shown(' '.join(rest[1:])) or 'nothing'}; see --help")
    if not words and len(rest) > 1:
        raise ValueError(f"{shown(rest[1])} is not a flag; write --{shown(rest[1])}, or remove it; see --help")
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
    recipe.load()
    return rest


def tell_plainly() -> None:
    """Let the log show a warning as "warning: ..." and escape what could be codes for a terminal.

    absl's own prefix, with time and place, is for programmers; `log.txt` of a run has the time.
    """
    handler = logging.get_absl_handler()
    handler.addFilter(_escape)
    handler.setFormatter(_Plain())


def path_of(flag: flags.FlagHolder[str | None], check: Callable[[str, str], Path]) -> Path | None:
    """Return the path that a flag names, checked by a function of `deepseek_jax.inputs`; None without the flag."""
    return None if flag.value is None else check(flag.value, f"--{flag.name}")


def for_terminal(text: str) -> str:
    """Return a model's text: as it is for a file, without escape codes for a terminal."""
    return printable_lines(text) if sys.stdout.isatty() else text


def own_flags(main: Callable) -> dict[str, flags.Flag]:
    """Return the flags of this project by name, those of the command first."""
    by_module = flags.FLAGS.flags_by_module_dict()
    command = [name for name in by_module if name in (sys.argv[0], "__main__", main.__module__)]
    shared = [name for name in by_module if name.startswith("experiments.") and name not in command]
    return {flag.name: flag for name in (*command, *shared) for flag in by_module[name]}


def usage(main: Callable) -> str:
    """Return the help of a command: its docstring and the flags of this project."""
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", "Flags (--helpfull has those of libraries too):"]
    for name, flag in own_flags(main).items():
        given = f"--[no]{name}" if flag.boolean else f"--{name}"
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        lines.append(f"  {given}")
        lines += textwrap.wrap(f"{flag.help}{default}", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _nearest(name: str) -> str:
    keys = recipe.same_name(name) if "config" in flags.FLAGS else []
    if keys:
        return f"did you mean --config.{keys[0]}?"
    close = difflib.get_close_matches(name, list(flags.FLAGS), n=1)
    if close:
        return f"did you mean --{close[0]}?"
    return (
        "see --help, and --print_config for the values of the config" if "print_config" in flags.FLAGS else "see --help"
    )


def _wrong_value(text: str) -> str:
    """Return absl's message about a flag, with the flag's help as the remedy."""
    if found := MISSING.fullmatch(text):
        return f"--{found['name']} is missing; give it: {flags.FLAGS[found['name']].help}"
    if (found := WRONG_VALUE.fullmatch(text)) and found["name"] in flags.FLAGS:
        return (
            f"--{found['name']}={shown(found['value'])}: {shown(found['why'])}; it is for:"
            f" {flags.FLAGS[found['name']].help}"
        )
    return f"{text}; see --help"


def _escape(record: python_logging.LogRecord) -> bool:
    """Escape control characters in a line of the log, which may quote names of files."""
    record.msg, record.args = "\n".join(map(printable, record.getMessage().splitlines())), ()
    return True


class _Plain(python_logging.Formatter):
    """The text alone, after a word for its level."""

    def format(self, record: python_logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > python_logging.INFO else ""
        return level + super().format(record)
