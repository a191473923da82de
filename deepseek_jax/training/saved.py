"""The checkpoints of a workdir as files, without Orbax: which are complete, and whether any are lost.

`saved.json` has the step of the newest complete checkpoint. So a run whose checkpoints are gone (deleted, or on a disk
that is not mounted) is told from one that died before its first.
"""

import json
import os
from pathlib import Path

import jax

from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import read_json

CHECKPOINTS, SAVED = "checkpoints", "saved.json"  # in a workdir
DAMAGED = "damaged"  # in the folder of the checkpoints: those that failed verification


def stored_steps(workdir: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `workdir`, oldest first; none if there is no such folder."""
    try:
        names = [entry.name for entry in os.scandir(workdir / CHECKPOINTS) if entry.is_dir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def check_saved(workdir: Path) -> None:
    """Refuse a workdir that cannot hold checkpoints, or has lost them.

    Raises:
        ValueError: something else has the name of a folder, or saved.json tells of a checkpoint and there is none.
    """
    folder, saved = workdir / CHECKPOINTS, workdir / SAVED
    for path in (folder, folder / DAMAGED):
        if os.path.lexists(path) and not path.is_dir():
            what = "a link to a folder that does not exist" if path.is_symlink() else "a file"
            raise ValueError(f"{path} is {what}; restore the folder, or remove this")
    if os.path.lexists(saved) and not stored_steps(workdir):
        raise ValueError(
            f"the checkpoints of this run are gone: {folder} has none, and {SAVED} says that step"
            f" {read_json(saved).get('step')} was saved; put them back, or use another --workdir"
        )


def note_saved(workdir: Path) -> None:
    """Write the step of the newest complete checkpoint, if there is one, into saved.json; the first process does."""
    steps = stored_steps(workdir)
    if steps and jax.process_index() == 0:
        write_atomically(workdir / SAVED, json.dumps({"step": steps[-1]}) + "\n")
