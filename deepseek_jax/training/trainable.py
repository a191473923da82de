"""What a stage trains: all weights, or adapters, which begin as the base computes or where another run left them.

lora.initial
""               A random, B zero: the first step computes what the base computes
"workdir@500"    the adapters of step 500 of a run: of the same base, rank, alpha and targets
"""

import functools
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.adapters import Lora
from deepseek_jax.config import Config
from deepseek_jax.inputs import local_path, shown
from deepseek_jax.training.adapted import Parts, open_adapters
from deepseek_jax.training.adapters_file import read_adapters_file
from deepseek_jax.training.objective import Objective
from deepseek_jax.training.origin import initial_state, read_origin
from deepseek_jax.training.saved import stored_steps
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import jit_train_step
from deepseek_jax.training.weights import restore_adapters
from deepseek_jax.training.workdir import read_config

KEY = "config.posttraining.lora.initial"


def open_parts(
    config: Config, lora: Lora | None, objective: Objective, workdir: Path, mesh: jax.sharding.Mesh
) -> Parts:
    """Return how all weights are trained, or adapters; call it under `jax.set_mesh(mesh)`.

    Raises:
        ValueError: as `training.adapted.open_adapters` and `find_adapters`.
    """
    if lora:
        first = functools.partial(first_adapters, lora, mesh) if lora.initial else None
        return open_adapters(config, lora, objective, workdir, mesh, first)
    return Parts(
        jit_train_step(config, objective, mesh),
        abstract_state(config, mesh),
        functools.partial(initial_state, config, workdir, mesh),
        lambda weights: weights,
        lambda: read_origin(config, mesh, whole=False).weights,
    )


def first_adapters(lora: Lora, mesh: jax.sharding.Mesh, base: str) -> Any:
    """Return the adapters that `lora.initial` names, which are to be of a base with this fingerprint."""
    folder, step = find_adapters(lora, base)
    return restore_adapters(read_config(folder), folder, mesh, step)[0]


def find_adapters(lora: Lora, base: str) -> tuple[Path, int]:
    """Return workdir and step of the adapters that a run begins with.

    Raises:
        ValueError: they are not there, of another base, or of another shape.
    """
    name, at, number = lora.initial.rpartition("@")
    is_step = at and number.isascii() and number.isdecimal()
    folder = local_path(name if is_step else lora.initial, KEY)
    found = read_adapters_file(folder)
    if found is None:
        raise ValueError(
            f"{KEY} = {shown(repr(lora.initial))} is no run of adapters; name the workdir of one with its step,"
            " 'runs/tiny_lora@100', where it is now if it has moved; weights are named by --initial"
        )
    steps = stored_steps(folder)
    if not steps:
        raise ValueError(
            f"{KEY} = {shown(repr(lora.initial))} is a run without a checkpoint; let it train until its first save, or"
            " name another"
        )
    if not is_step or int(number) not in steps:
        raise ValueError(
            f"{KEY} = {shown(repr(lora.initial))} must name a step of that run, which has {steps}:"
            f" {folder}@{max(steps)}"
        )
    if found.base != base:
        raise ValueError(
            f"{KEY} = {shown(repr(lora.initial))} has adapters of another base than --initial; name theirs:"
            f" training.initial_weights in {folder / 'config.json'}"
        )
    for key in ("rank", "alpha", "targets"):
        if (there := getattr(found.lora, key)) != getattr(lora, key):
            raise ValueError(
                f"{KEY} = {shown(repr(lora.initial))} has {key} = {there!r}, and config.posttraining.lora.{key} ="
                f" {getattr(lora, key)!r}; give {there!r}"
            )
    return folder, int(number)
