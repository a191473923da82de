"""Checkpoints of a run: written while training continues, verified when read, restorable onto any mesh.

    workdir/config.json                    the configuration that owns the workdir
    workdir/checkpoints/<step>/state       parameters, router bias, optimizer, counters (Orbax; an array is stored as
                                           one, whatever the mesh)
    workdir/checkpoints/<step>/run         step, tokens seen, data position, configuration, environment, fingerprints
                                           (JSON)
    workdir/checkpoints/<step>/tokenizer   content of the workdir's tokenizer files, by name (JSON)
    workdir/checkpoints/damaged/           checkpoints that failed verification; moved here, never deleted

A save copies the arrays to the host, then writes `<step>.orbax-checkpoint-tmp` in the background and renames it once
every byte is on disk. So a process that is killed at any moment leaves complete checkpoints and at most one temporary
folder, which the next start removes.

Orbax notices missing files but not a flipped byte in an array. So each save also stores a fingerprint per array, made
on the devices and equal on every mesh, and each restore makes them again and compares.

Rule for a damaged checkpoint: a warning names it and what is wrong, and the newest intact one is used. A run is a
function of its state, so to go back costs time and loses nothing. If none is intact, the start is refused and nothing
is moved; there is no silent start from scratch.
"""

import dataclasses
import json
import os
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from deepseek_jax.config import Config, to_dict
from deepseek_jax.parallel.mesh import environment
from deepseek_jax.training.fingerprint import fingerprints

TMP_SUFFIX = ".orbax-checkpoint-tmp"  # Orbax's name for the folder of an unfinished save

LONGEST_REASON = 240  # characters of a foreign error message


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are intact."""


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


def _warn_of_changes(stored: dict[str, Any], here: dict[str, Any]) -> None:
    for key in here:
        if stored.get(key) != here[key]:
            logging.warning(
                "the checkpoint was written with %s = %s, this process has %s: the arrays are equal, the run that"
                " follows need not be",
                *(key, stored.get(key), here[key]),
            )


def _seal(payload: Any) -> dict[str, Any]:
    return {"payload": payload, "crc32": _crc32(payload)}


def _unseal(sealed: dict[str, Any], item: str) -> Any:
    if _crc32(sealed["payload"]) != sealed["crc32"]:
        raise ValueError(f"checksum of the item {item!r} differs")
    return sealed["payload"]


def _crc32(payload: Any) -> int:
    return zlib.crc32(json.dumps(payload, sort_keys=True).encode())


def _reason(error: Exception) -> str:
    """Return the part of an error that a person can use.

    TensorStore prints its whole specification, and says at the end what went wrong.
    """
    text = str(error) or repr(error)
    before_spec = text.split(" [tensorstore_spec=")[0].split(" [os_error_code=")[0].split("\n")[0]
    return before_spec if len(before_spec) <= LONGEST_REASON else "... " + before_spec[-LONGEST_REASON:]


class Checkpoints:
    """The checkpoints of one workdir. Opening them for writing removes what an unfinished save left behind.

    Args:
        workdir: the run's folder.
        keep: how many complete checkpoints stay; `None` opens them for reading, and nothing is written or removed.

    Raises:
        ValueError: opened for reading, and there are no checkpoints.
    """

    def __init__(self, workdir: Path, keep: int | None):
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._writes = keep is not None
        if self._writes:
            self._remove_unfinished()
        elif not self.directory.exists():
            raise ValueError(
                f"{workdir} holds no checkpoints; train there first: python -m experiments.train --workdir={workdir}"
            )
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=self._writes)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

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
            run=ocp.args.JsonSave(_seal(json.loads(json.dumps(run)))),
            tokenizer=ocp.args.JsonSave(_seal(tokenizer)),
        )
        self._guard(partial(self._manager.save, progress.step, args=items, force=True))

    def check(self) -> None:
        """Raise `SaveError` if the save in the background has failed."""
        self._guard(self._manager.check_for_errors)

    def wait(self) -> None:
        """Wait until the save in the background is complete; raise `SaveError` if it failed."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait for the save in the background and release Orbax's threads."""
        self._guard(self._manager.close)

    def _guard(self, action) -> None:
        try:
            action()
        except Exception as error:  # Orbax passes on what the file system or TensorStore raised
            self._remove_unfinished()
            self._manager.reload()
            steps = self.steps()
            kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
            free = shutil.disk_usage(self.directory).free / 2**30
            raise SaveError(
                f"saving into {self.directory} failed: {_reason(error)}\n{kept}. {free:.2f} GiB are free there; make"
                " room (or lower training.keep_checkpoints) and run the same command to continue"
            ) from error

    def restore(
        self, abstract_state: Any, mesh: jax.sharding.Mesh, step: int | None = None
    ) -> tuple[Any, Progress, dict[str, str]] | None:
        """Return (state, progress, tokenizer) of the newest intact checkpoint, or of `step`; None if there is none.

        Args:
            abstract_state: `ShapeDtypeStruct`s with the shardings to restore onto, of any mesh. If it is a part of the
                saved tree (for example only `params` and `router_bias`), only that part is read.
            mesh: the mesh of these shardings; a warning tells if the environment is not the recorded one.
            step: the step to restore; the newest intact one if None.

        Raises:
            ValueError: `step` does not exist or is damaged, or no checkpoint is intact; the message names each damaged
                one and what is wrong with it.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"{self.directory} has no checkpoint of step {step}; it has {steps}")
        failures: dict[int, str] = {}
        for candidate in [step] if step is not None else reversed(steps):
            try:
                state, run, tokenizer = self._read(candidate, abstract_state)
            except Exception as error:  # a damaged file makes Orbax, TensorStore or json raise many types
                failures[candidate] = _reason(error)
            else:
                values = fingerprints(state)
                changed = [path for path, value in values.items() if run["fingerprints"].get(path) != value]
                if not changed:
                    _warn_of_changes(run["environment"], environment(mesh))
                    self._set_aside(list(failures))
                    return (
                        state,
                        Progress(step=run["step"], tokens_seen=run["tokens_seen"], data=run["data"]),
                        tokenizer,
                    )
                failures[candidate] = f"the values of {len(changed)} arrays have changed: {', '.join(changed[:3])}"
            logging.warning("checkpoint %s is damaged: %s", self.directory / str(candidate), failures[candidate])
        if failures:
            named = "\n".join(f"  {self.directory / str(number)}: {reason}" for number, reason in failures.items())
            others = [number for number in steps if number not in failures]
            remedy = (
                f"the others are {others}"
                if others
                else "restore one from a backup, or start again in another --workdir"
            )
            raise ValueError(f"no intact checkpoint:\n{named}\n{remedy}")
        return None

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any], dict[str, str]]:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args, partial_restore=True),
                run=ocp.args.JsonRestore(),
                tokenizer=ocp.args.JsonRestore(),
            ),
        )
        return items["state"], _unseal(items["run"], "run"), _unseal(items["tokenizer"], "tokenizer")

    def _set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints out of the way: the run will write these steps again."""
        if not steps or not self._writes:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory / "damaged" / f"{step}"
                number = 0
                while target.exists():
                    number += 1
                    target = target.with_name(f"{step}-{number}")
                target.parent.mkdir(exist_ok=True)
                os.replace(self.directory / str(step), target)
                logging.warning("moved the damaged checkpoint of step %d to %s", step, target)
        multihost_utils.sync_global_devices("checkpoints.set_aside")
        self._manager.reload()
