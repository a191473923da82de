"""Checkpoints of a run: written while training continues, verified when read, restorable onto any mesh.

    workdir/config.json                    the configuration that owns the workdir
    workdir/checkpoints/<step>/state       parameters, router bias, optimizer, counters (Orbax; an array is stored as
                                           one, whatever the mesh)
    workdir/checkpoints/<step>/run         step, tokens seen, data position, configuration, environment, fingerprints
                                           (JSON)
    workdir/checkpoints/<step>/tokenizer   content of the workdir's tokenizer files, by name (JSON)
    workdir/checkpoints/damaged/           checkpoints that failed verification; moved here, never deleted
    workdir/saved.json                     the step of the newest complete checkpoint

A save copies the arrays to the host, then writes `<step>.orbax-checkpoint-tmp` in the background and renames it once
every byte is on disk. So a process that is killed at any moment leaves complete checkpoints and at most one temporary
folder, which the next start removes.

Orbax notices missing files but not a flipped byte in an array. So each save also stores a fingerprint per array, made
on the devices and equal on every mesh, and each restore makes them again and compares.

Rule for a damaged checkpoint: a warning names it and what is wrong, and the newest intact one is used. A run is a
function of its state, so to go back costs time and loses nothing. If none is intact, the start is refused and nothing
is moved; there is no silent start from scratch. Nor is there one when all are gone: saved.json tells a run that lost
its checkpoints from one that died before its first.

Readers need no lock. The run may remove a checkpoint while one reads it; it does so after a newer one is complete, so
the reader takes that one.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from logging import ERROR, LogRecord
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from deepseek_jax.config import Config, to_dict
from deepseek_jax.parallel.mesh import environment
from deepseek_jax.storage import remedy
from deepseek_jax.training.fingerprint import fingerprints
from deepseek_jax.training.record import check_names, read_sealed, reason, seal, warn_of_changes
from deepseek_jax.training.saved import CHECKPOINTS, DAMAGED, check_saved, note_saved

TMP_SUFFIX = ".orbax-checkpoint-tmp"  # Orbax's name for the folder of an unfinished save

MOST_RETRIES = 20  # of a reader whose checkpoints are removed while it reads
ORBAX = Path(ocp.__file__).parent

# By default Orbax makes the folders of a save in one thread, and the threads that write wait for its signal: 300 s, in
# threads that keep the process alive, if the folder cannot be made and the signal never comes. Here the folders are
# made first, in a few milliseconds, and a failure is raised at once.
WITHOUT_WAITING_FOR_FOLDERS = ocp.AsyncOptions(create_directories_asynchronously=False)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are intact."""


def _is_news(record: LogRecord) -> bool:
    """Refuse the tracebacks that each of Orbax's threads logs of a failed save: `SaveError` says it once."""
    return not (record.levelno >= ERROR and Path(record.pathname).is_relative_to(ORBAX))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, without its arrays.

    Attributes:
        step: optimizer steps taken.
        tokens_seen: positions fed to the model, batch size times sequence length summed over the steps; exact.
        data: the loader's position, as `Loader.state()` returns it (JSON).
    """

    step: int
    tokens_seen: int
    data: Any


class Checkpoints:
    """The checkpoints of one workdir. Opening them for writing removes what an unfinished save left behind.

    Args:
        workdir: the run's folder.
        keep: how many complete checkpoints stay; `None` opens them for reading, and nothing is written or removed.

    Raises:
        ValueError: opened for reading, and there are no checkpoints; or the run's checkpoints are lost.
    """

    def __init__(self, workdir: Path, keep: int | None):
        self.directory = Path(workdir).absolute() / CHECKPOINTS
        self._writes = keep is not None
        self._noted: int | None = None  # in saved.json, by this process
        check_saved(self.directory.parent)
        if self._writes:
            self._remove_unfinished()
        elif not self.directory.exists():
            raise ValueError(
                f"{workdir} holds no checkpoints; train there first: python -m experiments.train --workdir={workdir}"
            )
        self._failed = False
        logging.get_absl_logger().addFilter(_is_news)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=self._writes, async_options=WITHOUT_WAITING_FOR_FOLDERS
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def _note_saved(self) -> None:
        newest = self._manager.latest_step()
        if self._writes and newest != self._noted and (self.directory / str(newest)).is_dir():
            note_saved(self.directory.parent)
            self._noted = newest

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0 and self.directory.exists():
            for leftover in self.directory.glob(f"*{TMP_SUFFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: Any, progress: Progress, config: Config, tokenizer: dict[str, str], mesh: jax.sharding.Mesh
    ) -> None:
        """Start to save; return once the arrays are copied from the devices, so that the caller may donate them.

        Args:
            state: the training state.
            progress: where the run stands with this state.
            config: the run's configuration.
            tokenizer: file name to content, as `read_tokenizer` returns it.
            mesh: the mesh that the state lives on.

        Raises:
            SaveError: this save could not start, or the one before it failed.
        """
        run = dataclasses.asdict(progress) | {
            "config": to_dict(config),
            "environment": environment(mesh),
            "fingerprints": fingerprints(state),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            run=ocp.args.JsonSave(seal(json.loads(json.dumps(run)))),
            tokenizer=ocp.args.JsonSave(seal(tokenizer)),
        )
        self._guard(partial(self._manager.save, progress.step, args=items, force=True))

    def check(self) -> None:
        """Raise `SaveError` if the save in the background has failed."""
        idle = not self._manager.is_saving_in_progress()  # asked first: a save that fails meanwhile is seen next time
        self._guard(self._manager.check_for_errors)
        if idle:
            self._guard(self._note_saved)

    def wait(self) -> None:
        """Wait until the save in the background is complete; raise `SaveError` if it failed."""
        self._guard(self._manager.wait_until_finished)
        self._guard(self._note_saved)

    def close(self) -> None:
        """Wait for the save in the background and release Orbax's threads; a failure that was raised is not again."""
        if self._failed:
            with contextlib.suppress(Exception):
                self._manager.close()
        else:
            self._guard(self._manager.close)
            self._guard(self._note_saved)

    def _guard(self, action) -> None:
        try:
            action()
        except Exception as error:  # Orbax passes on what the file system or TensorStore raised
            self._failed = True
            raise SaveError(
                f"saving into {self.directory} failed: {reason(error)}\n{self._kept()};"
                f" {remedy(error, self.directory, ' (or lower training.keep_checkpoints)')}; the same command continues"
            ) from error

    def _kept(self) -> str:
        """Say what a failed save leaves, from the folder itself: Orbax's list may have the step that failed."""
        try:
            self._remove_unfinished()
            steps = [int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()]
        except OSError as error:
            return f"the folder cannot be read ({error.strerror})"
        return f"the checkpoint of step {max(steps)} is intact" if steps else "there is no earlier checkpoint"

    def restore(
        self,
        abstract_state: Any,
        mesh: jax.sharding.Mesh,
        step: int | None = None,
        accept: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> tuple[Any, Progress, dict[str, str]] | None:
        """Return (state, progress, tokenizer) of the newest intact checkpoint, or of `step`; None if there is none.

        Args:
            abstract_state: `ShapeDtypeStruct`s with the shardings to restore onto, of any mesh. If it is a part of the
                saved tree (for example only `params` and `router_bias`), only that part is read.
            mesh: the mesh of these shardings; a warning tells if the environment is not the recorded one.
            step: the step to restore; the newest intact one if None.
            accept: gets a checkpoint's record (the item `run`) before its arrays are read. What it raises is raised
                here.

        Raises:
            ValueError: `step` does not exist or is damaged, or no checkpoint is intact (the message says what is wrong
                with each), or one has other arrays.
        """
        failures: dict[int, str] = {}
        retries = 0
        while True:
            steps = self.steps()
            if step is not None and step not in steps:
                raise ValueError(f"{self.directory} has no checkpoint of step {step}; it has {steps}")
            left = [each for each in reversed(steps) if each not in failures and step in (None, each)]
            if not left:
                break
            found = self._try(left[0], abstract_state, accept)
            if not isinstance(found, str):
                state, record, tokenizer = found
                warn_of_changes(record["environment"], environment(mesh))
                self._set_aside(list(failures))
                self._note_saved()
                progress = Progress(step=record["step"], tokens_seen=record["tokens_seen"], data=record["data"])
                return state, progress, tokenizer
            if retries < MOST_RETRIES and self._has_moved_on(steps):
                retries += 1
                continue
            failures[left[0]] = found
            logging.warning("checkpoint %s is damaged: %s", self.directory / str(left[0]), found)
        if failures:
            raise ValueError(self._describe(failures))
        return None

    def _try(
        self, step: int, abstract_state: Any, accept: Callable[[dict[str, Any]], None]
    ) -> tuple[Any, dict[str, Any], dict[str, str]] | str:
        """Return state, record and tokenizer of a checkpoint, or what is wrong with it."""
        folder = self.directory / str(step)
        try:
            record, tokenizer = read_sealed(folder / "run"), read_sealed(folder / "tokenizer")
        except ValueError as error:
            return reason(error)
        accept(record)
        check_names(record, abstract_state)
        try:
            state = self._read_arrays(step, abstract_state)
        except Exception as error:  # a damaged file makes Orbax, TensorStore or json raise many types
            return reason(error)
        changed = [path for path, value in fingerprints(state).items() if record["fingerprints"].get(path) != value]
        if changed:
            return f"the values of {len(changed)} arrays have changed: {', '.join(changed[:3])}"
        return state, record, tokenizer

    def _read_arrays(self, step: int, abstract_state: Any) -> Any:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        state = ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=state))["state"]

    def _has_moved_on(self, steps: list[int]) -> bool:
        """Return whether the run that writes these checkpoints has saved a newer one, or removed one, since `steps`."""
        if self._writes:
            return False
        self._manager.reload()
        return self.steps() != steps

    def _describe(self, failures: dict[int, str]) -> str:
        named = "\n".join(f"  {self.directory / str(number)}: {what}" for number, what in failures.items())
        others = [number for number in self.steps() if number not in failures]
        remedy = (
            f"the others are {others}" if others else "restore one from a backup, or start again in another --workdir"
        )
        return f"no intact checkpoint:\n{named}\n{remedy}"

    def _set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints out of the way: the run will write these steps again."""
        if not steps or not self._writes:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory / DAMAGED / f"{step}"
                number = 0
                while target.exists():
                    number += 1
                    target = target.with_name(f"{step}-{number}")
                target.parent.mkdir(exist_ok=True)
                os.replace(self.directory / str(step), target)
                logging.warning("moved the damaged checkpoint of step %d to %s", step, target)
        multihost_utils.sync_global_devices("checkpoints.set_aside")
        self._manager.reload()
