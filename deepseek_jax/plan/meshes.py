"""The meshes that a config can run on, found by asking the very checks that a run asks (`parallel.mesh`).

A config names one mesh, and usually leaves one axis open: `data = -1`. Other numbers of devices may work with another
mesh or micro-batch. Those are offered as the values to change.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Mapping

import jax

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.parallel.mesh import AnyMesh, axis_size, check_fit, check_model_fit, mesh_shape
from deepseek_jax.parameters import ROWS

MOST_DEVICES = 2048  # of the report's cluster
MOST_SHARING = 8  # devices that a plan lets share sequences on its own; they exchange latents in every layer


@dataclasses.dataclass(frozen=True)
class Fit:
    """A config on a number of devices that its run accepts.

    Attributes:
        num_devices: of the mesh.
        config: with `changes` applied, checked.
        mesh: sizes of all axes.
        changes: values by dotted key that differ from the config as it was given; empty if it fits as it is.
    """

    num_devices: int
    config: Config
    mesh: jax.sharding.AbstractMesh
    changes: Mapping[str, int | str]

    @property
    def flags(self) -> str:
        """The changes as a command's flags."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


def fit_as_written(config: Config, num_devices: int) -> Fit:
    """Return `config` on `num_devices` devices.

    Raises:
        ValueError: a run would refuse it; the message is the run's own.
    """
    mesh = abstract_mesh(mesh_shape(config.mesh, num_devices))
    check_fit(config, mesh)
    return Fit(num_devices, config, mesh, {})


def find_fit(config: Config, num_devices: int) -> Fit | None:
    """Return `config` on `num_devices` devices with as few changes of mesh and micro-batch as work; None if none do.

    Experts are spread over as many devices as `config` spreads them over, or else over the next smaller number that
    works. A micro-batch that does not fit becomes one sequence per device or, in FP8, more. Where the batch has fewer
    sequences than that, devices share each: `mesh.context`.
    """
    for mesh_changes in _meshes(config, num_devices):
        sized = config.with_(mesh={key.removeprefix("mesh."): size for key, size in mesh_changes.items()})
        if not _fits_model(sized, num_devices):
            continue
        mesh = abstract_mesh(mesh_shape(sized.mesh, num_devices))
        for batch_changes in _micro_batches(config, axis_size(mesh, ROWS)):
            fitting = sized.with_(training={key.removeprefix("training."): n for key, n in batch_changes.items()})
            if accepted(fitting, mesh):
                return Fit(num_devices, fitting, mesh, mesh_changes | batch_changes)
    return None


def smallest_micro_batch(fit: Fit) -> int:
    """Return the smallest micro-batch that works on the mesh of `fit`; its own is one that does."""
    rows, own = axis_size(fit.mesh, ROWS), fit.config.training.micro_batch_size
    works = (
        n for n in range(rows, own, rows) if accepted(fit.config.with_(training={"micro_batch_size": n}), fit.mesh)
    )
    return next(works, own)


@functools.lru_cache(maxsize=64)
def find_fits(config: Config, most: int = MOST_DEVICES) -> tuple[Fit, ...]:
    """Return a fit for every number of devices up to `most` that works."""
    counts = (count for count in range(1, most + 1) if any(True for _ in _contexts(config, count)))
    return tuple(fit for count in counts if (fit := find_fit(config, count)) is not None)


def require_fit(config: Config, num_devices: int) -> Fit:
    """Return `config` as it is written on `num_devices` devices.

    Raises:
        ValueError: a run would refuse it. The message is the run's, with the flags that help or the numbers that work.
    """
    try:
        return fit_as_written(config, num_devices)
    except ValueError as error:
        fit = find_fit(config, num_devices)
        if fit is not None:
            raise ValueError(f"{error}; it works on {num_devices} with {fit.flags}") from None
        cause = str(error).partition("; the nearest ")[0]  # which would be another model
        works = ", ".join(str(fit.num_devices) for fit in find_fits(config)) or "none"
        raise ValueError(
            f"{num_devices} devices do not work; numbers of devices that work: {works}. Of {num_devices}: {cause}"
        ) from None


def abstract_mesh(shape: dict[str, int]) -> jax.sharding.AbstractMesh:
    """Return a mesh of no devices in particular, by sizes of its axes."""
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))


def axes_text(mesh: AnyMesh) -> str:
    """Return the axes of a mesh that have several devices, as a person reads them."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "no axis is split"


def _fits_model(config: Config, num_devices: int) -> bool:
    try:
        check_model_fit(config.model, abstract_mesh(mesh_shape(config.mesh, num_devices)))
    except ValueError:
        return False
    return True


def as_fit(config: Config, num_devices: int, changes: Mapping[str, int | str]) -> Fit | None:
    """Return `config` with `changes`, by dotted key, on `num_devices` devices; None if its mesh has no such number.

    Changes that change nothing are left out. Whether a run takes it, `accepted` says.
    """
    sections: dict[str, dict[str, int | str]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = config.with_(**sections)
    kept = {key: value for key, value in changes.items() if operator.attrgetter(key)(config) != value}
    try:
        return Fit(num_devices, changed, abstract_mesh(mesh_shape(changed.mesh, num_devices)), kept)
    except ValueError:
        return None


def accepted(config: Config, mesh: jax.sharding.AbstractMesh) -> bool:
    """Return whether a run takes `config` on `mesh`."""
    try:
        check_fit(from_config_dict(to_dict(config)), mesh)
    except ValueError:
        return False
    return True


def _meshes(config: Config, num_devices: int) -> Iterator[dict[str, int]]:
    """Yield changes of the mesh: none, then other numbers of devices that share the experts, largest first.

    They are tried with as few devices that share sequences as the batch leaves.
    """
    yield {}
    wanted = _size(config.mesh.node) * _size(config.mesh.expert)
    for context in _contexts(config, num_devices):
        rows = num_devices // (context * _size(config.mesh.pipe))
        for sharing in range(min(wanted, rows), 0, -1):
            if rows % sharing == 0:
                expert = math.gcd(sharing, _size(config.mesh.expert))
                sizes = {"data": -1, "context": context, "node": sharing // expert, "expert": expert}
                yield {f"mesh.{axis}": n for axis, n in sizes.items() if n != getattr(config.mesh, axis)}


def _contexts(config: Config, num_devices: int) -> Iterator[int]:
    """Yield how many devices may share sequences so that every batch has a sequence for each group of them."""
    own, sequences, pipe = _size(config.mesh.context), _sequences(config), _size(config.mesh.pipe)
    for context in range(own, min(num_devices, own * MOST_SHARING) + 1, own):
        is_shared = context == 1 or config.data.sequence_length % (2 * context) == 0
        if is_shared and num_devices % (context * pipe) == 0 and sequences % (num_devices // context // pipe) == 0:
            yield context


def _micro_batches(config: Config, rows: int) -> Iterator[dict[str, int]]:
    yield {}
    sequences = _sequences(config)
    for micro_batch in range(rows, sequences + 1, rows):
        if sequences % micro_batch == 0:
            yield {"training.micro_batch_size": micro_batch}


def _sequences(config: Config) -> int:
    """Return the most sequences of which all batches of a run are whole multiples."""
    return math.gcd(*(int(size) for _, _, size in config.training.batch_size))


def _size(axis: int) -> int:
    return max(axis, 1)  # -1 is whatever is left
