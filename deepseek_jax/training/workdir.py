"""The workdir of a run: which configuration owns it, its tokenizer, and who may write into it.

workdir/config.json                              the configuration
workdir/tokenizer.json, tokenizer_config.json    every checkpoint has their content too
workdir/checkpoints/, saved.json                 `training.checkpoint`, `training.saved`
workdir/metrics.jsonl, tensorboard/              `training.metrics`
workdir/tokens-*/                                `data.token_cache`
workdir/.lock                                    while a run is being written: by whom

A run owns its workdir from the moment that everything is built (`claim_workdir`). What an earlier failure made is
removed; only the token cache stays, whose name is a digest of all that it was made from.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.run_tokenizer import RECORD as TOKENIZER_RECORD
from deepseek_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from deepseek_jax.files import write_atomically
from deepseek_jax.huggingface.imported_recipe import FILE as RECIPE
from deepseek_jax.inputs import read_json, read_text, shown
from deepseek_jax.locks import locked
from deepseek_jax.parallel.watch import ProcessError
from deepseek_jax.training.continuation import REMEDY, check_continues
from deepseek_jax.training.saved import CHECKPOINTS, stored_steps

HUGGINGFACE = "huggingface"  # what an import keeps of the folder it came from
ADAPTERS = "adapters.json"  # which weights have adapters, of a run that trains them (`training.adapters_file`)
REFERENCE = "reference"  # checkpoints of the weights that GRPO compares with (`posttraining.reference`)
TEMPLATE_DATE = "template_date.txt"  # that a chat template writes in this run (`posttraining.beginning`)
# What a start or an import makes before it owns the workdir.
UNCLAIMED = (*TOKENIZER_FILES, TOKENIZER_RECORD, CHECKPOINTS, HUGGINGFACE, TEMPLATE_DATE, RECIPE, ADAPTERS, REFERENCE)
MOST_NAMED = 5  # of runs in a message
WAIT_SECONDS = 5.0  # for another trainer to end: a requeued job may overlap the one before
LONGEST_REFUSAL = 2000  # bytes that one process tells the others
BY_US, BY_THE_SYSTEM = 1, 2  # who refuses a workdir: a ValueError, an OSError


@contextlib.contextmanager
def occupied(workdir: Path) -> Iterator[None]:
    """Be the only run that writes into `workdir`, which is made if it does not exist, for the time of the context.

    All processes of a run enter together; the first has the lock. If the context ends in an exception and `workdir`
    belongs to no run, what was made since is removed.

    Raises:
        ValueError: another process trains in `workdir`, or no folder can be there; the same on every process.
        OSError: the system refused something at the door of the first process. It has the error of the system, and the
            others a `ProcessError` that quotes it: they wait here for its word.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(_alone(Path(workdir)))
            except (ValueError, OSError) as error:
                refusal = error
        if jax.process_count() > 1:
            refusal = _of_the_first(refusal)
        if refusal is not None:
            raise refusal
        yield


def _of_the_first(refusal: ValueError | OSError | None) -> Exception | None:
    """Tell the other processes what refuses the workdir to the first; return what this one should raise."""
    told = np.zeros(1 + LONGEST_REFUSAL, np.uint8)  # who refuses, and the message
    if refusal is not None:
        text = str(refusal).encode(errors="backslashreplace")[:LONGEST_REFUSAL]
        told[0] = BY_THE_SYSTEM if isinstance(refusal, OSError) else BY_US
        told[1 : 1 + len(text)] = np.frombuffer(text, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(told))
    text = told[1:].tobytes().rstrip(b"\0").decode(errors="replace")
    if refusal is not None or not told[0]:
        return refusal
    if told[0] == BY_THE_SYSTEM:
        return ProcessError(f"the first process cannot use the workdir: {shown(text)}")
    return ValueError(text)


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    made = [path for path in (workdir, *workdir.parents) if not os.path.lexists(path)]
    try:
        _make(workdir)
        with locked(workdir, WAIT_SECONDS) as abandoned:
            if not is_claimed(workdir):
                _check_unclaimed(workdir, abandoned)
            before = {name for name in UNCLAIMED if os.path.lexists(workdir / name)}
            try:
                yield
            except BaseException:
                if not is_claimed(workdir):
                    _remove(workdir, set(UNCLAIMED) - before)
                raise
    finally:
        with contextlib.suppress(OSError):  # a folder with something in it stays
            for path in made:
                path.rmdir()


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        path = shown(str(workdir))
        if os.path.islink(workdir):
            text = f"{path} is a link to a folder that does not exist; mount or make that, or choose another --workdir"
        elif isinstance(error, FileExistsError):
            text = f"{path} is a file; choose a folder as --workdir"
        else:
            text = f"the workdir {path} cannot be made: {error.strerror}; choose another --workdir"
        raise ValueError(text) from error


def _check_unclaimed(workdir: Path, abandoned: bool) -> None:
    """Remove what a killed start left in a workdir of no run; refuse a tokenizer of unknown origin, and keep it."""
    if abandoned:
        logging.warning("a start in %s was killed before it owned the folder; its tokenizer is made anew", workdir)
        _remove(workdir, {*TOKENIZER_FILES, TOKENIZER_RECORD, HUGGINGFACE, ADAPTERS})
    for name in TOKENIZER_FILES:
        if os.path.lexists(workdir / name) and not os.path.lexists(workdir / TOKENIZER_RECORD):
            raise ValueError(
                f"{workdir} holds {name} but no run; name a tokenizer in data.tokenizer, and remove this one"
            )


def _remove(workdir: Path, names: set[str]) -> None:
    """Remove files and folders; links stay, since no start makes one."""
    for path in (workdir / name for name in names):
        if path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_claimed(workdir: Path) -> bool:
    """Return whether a run owns `workdir`."""
    return os.path.lexists(workdir / "config.json") or bool(stored_steps(workdir))


def claim_workdir(workdir: Path, config: Config) -> None:
    """Write `config` into `workdir`, which then belongs to it.

    Call it after everything is built, so that a config with a mistake does not own a workdir.
    """
    if jax.process_index() == 0:
        write_atomically(workdir / "config.json", json.dumps(to_dict(config), indent=1) + "\n")


def check_workdir(workdir: Path, config: Config, remedy: str = REMEDY) -> None:
    """Check that `workdir` is free, or holds a run that `config` may continue; else `remedy` says what to do.

    Raises:
        ValueError: it holds a run with another configuration, and the message shows each difference; or it is the
            folder of another run's checkpoints.
    """
    path = workdir / "config.json"
    if CHECKPOINTS in workdir.absolute().parts[-2:] and (around := _around(workdir)):
        raise ValueError(f"{shown(str(workdir))} is inside of a run; give the run's own folder, --workdir={around}")
    if os.path.lexists(path):
        stored = read_config(workdir)
        check_continues(to_dict(stored), config, workdir, "the workdir", bool(stored_steps(workdir)), remedy=remedy)
        if stored.data.tokenizer != config.data.tokenizer and (workdir / TOKENIZER_FILES[0]).exists():
            check_tokenizer(config, workdir)


def _near(workdir: Path) -> str:
    """Return which runs are inside or around a folder without one, as a remedy; "" if none is."""
    if around := _around(workdir):
        return f"give the run's own folder, --workdir={around}"
    inside = sorted(path.parent for path in workdir.glob("*/config.json") if _is_run(path.parent))
    if not inside:
        return ""
    more = f" and {len(inside) - MOST_NAMED} more" if len(inside) > MOST_NAMED else ""
    return f"give one of the runs inside, {', '.join(f'--workdir={path}' for path in inside[:MOST_NAMED])}{more}"


def _around(workdir: Path) -> Path | None:
    """Return the run that a folder, or the folder above it, lies in."""
    return next(filter(_is_run, workdir.absolute().parents[:2]), None)


def _is_run(folder: Path) -> bool:
    """Return whether a folder has a run's configuration; a checkpoint's in Hugging Face's format is none."""
    try:
        tree = read_json(folder / "config.json")
    except ValueError:
        return False
    return isinstance(tree, dict) and "training" in tree


def read_config(workdir: Path) -> Config:
    """Return the configuration that `workdir` was started with.

    Raises:
        ValueError: there is no run in `workdir`, or its config.json cannot be read.
    """
    path = workdir / "config.json"
    if not os.path.lexists(path):
        if stored_steps(workdir):
            remedy = f"train on with --workdir={workdir} and the run's --config, which writes it anew"
        else:
            remedy = _near(workdir) or f"train one with experiments.train --workdir={workdir}"
        raise ValueError(f"{shown(str(workdir))} holds no run: {path.name} is missing; {shown(remedy)}")
    tree = read_json(path)
    try:
        return from_config_dict(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tokenizer(workdir: Path) -> dict[str, str]:
    """Return the content of the workdir's tokenizer files by name.

    Raises:
        ValueError: one is missing or not a text file.
    """
    return {name: read_text(workdir / name) for name in TOKENIZER_FILES}


def check_tokenizer(config: Config, workdir: Path) -> None:
    """Refuse a `data.tokenizer` that names another tokenizer than the one in `workdir`; "bpe" names none.

    Raises:
        ValueError: it does, or one of them cannot be read.
    """
    name = config.data.tokenizer
    if name == "bpe":
        return
    named = byte_tokenizer() if name == "byte" else Tokenizer.load(name)
    if named.fingerprint != Tokenizer.load(workdir / TOKENIZER_FILES[0]).fingerprint:
        raise ValueError(
            f"data.tokenizer = {shown(name)!r} is another tokenizer than the one of these weights, whose ids mean other"
            " tokens; name theirs, or 'bpe' to take it as it is"
        )


def put_tokenizer(workdir: Path, files: dict[str, str]) -> None:
    """Write the tokenizer files of a checkpoint into `workdir` where they are missing.

    Raises:
        ValueError: `workdir` has another tokenizer than the checkpoint, whose ids mean other tokens.
    """
    for name, content in files.items():
        path = workdir / name
        if not path.exists():
            write_atomically(path, content)
        elif read_text(path) != content:
            raise ValueError(
                f"{path} is not the tokenizer of the checkpoint; remove it, and the checkpoint's own is put back"
            )
