"""The meshes that a config can run on, found by asking the very checks that a run asks (`parallel.mesh`).

A config names one mesh, and usually leaves one axis open: `data = -1`. Other numbers of devices may work with another
mesh or micro-batch. Those are offered as the values to change.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.parallel.mesh import check_fit, check_model_fit, mesh_shape

MOST_DEVICES = 2048  # of the report's cluster


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
    changes: dict[str, int]

    @property
    def flags(self) -> str:
        """The changes as a command's flags."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


def fit_as_written(config: Config, num_devices: int) -> Fit:
    """Return `config` on `num_devices` devices.

    Raises:
        ValueError: a run would refuse it; the message is the run's own.
    """
    mesh = _abstract(mesh_shape(config.mesh, num_devices))
    check_fit(config, mesh)
    return Fit(num_devices, config, mesh, {})


def find_fit(config: Config, num_devices: int) -> Fit | None:
    """Return `config` on `num_devices` devices with as few changes of mesh and micro-batch as work; None if none do.

    Experts are spread over as many devices as `config` spreads them over, or else over the next smaller number that
    works. A micro-batch that does not fit becomes one sequence per device or, in FP8, more.
    """
    for mesh_changes in _meshes(config, num_devices):
        sized = config.with_(mesh={key.removeprefix("mesh."): size for key, size in mesh_changes.items()})
        if not _fits_model(sized, num_devices):
            continue
        mesh = _abstract(mesh_shape(sized.mesh, num_devices))
        for batch_changes in _micro_batches(config, num_devices):
            fitting = sized.with_(training={key.removeprefix("training."): n for key, n in batch_changes.items()})
            if _accepted(fitting, mesh):
                return Fit(num_devices, fitting, mesh, mesh_changes | batch_changes)
    return None


def smallest_micro_batch(fit: Fit) -> int:
    """Return the smallest micro-batch that works on the mesh of `fit`; its own is one that does."""
    sizes = range(fit.num_devices, fit.config.training.micro_batch_size, fit.num_devices)
    accepted = (n for n in sizes if _accepted(fit.config.with_(training={"micro_batch_size": n}), fit.mesh))
    return next(accepted, fit.config.training.micro_batch_size)


@functools.lru_cache(maxsize=64)
def find_fits(config: Config, most: int = MOST_DEVICES) -> tuple[Fit, ...]:
    """Return a fit for every number of devices up to `most` that works.

    Batch and dense weights are split over all devices, however the mesh divides them. So a number that does not work
    with whole experts on every device works with no other mesh, and is not tried further.
    """
    open_mesh = config.with_(mesh={"data": -1, "context": 1, "node": 1, "expert": 1})
    counts = (count for count in range(1, most + 1) if _fits_model(open_mesh, count))
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


def _abstract(shape: dict[str, int]) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))


def _fits_model(config: Config, num_devices: int) -> bool:
    try:
        check_model_fit(config.model, _abstract(mesh_shape(config.mesh, num_devices)))
    except ValueError:
        return False
    return True


def _accepted(config: Config, mesh: jax.sharding.AbstractMesh) -> bool:
    try:
        check_fit(from_config_dict(to_dict(config)), mesh)
    except ValueError:
        return False
    return True


def _meshes(config: Config, num_devices: int) -> Iterator[dict[str, int]]:
    """Yield changes of the mesh: none, then other numbers of devices that share the experts, largest first."""
    yield {}
    wanted = _size(config.mesh.node) * _size(config.mesh.expert)
    for sharing in range(min(wanted, num_devices), 0, -1):
        if num_devices % sharing == 0:
            expert = math.gcd(sharing, _size(config.mesh.expert))
            sizes = {"node": sharing // expert, "expert": expert}
            if config.mesh.context != -1:
                sizes |= {"data": -1}
            yield {f"mesh.{axis}": n for axis, n in sizes.items() if n != getattr(config.mesh, axis)}


def _micro_batches(config: Config, num_devices: int) -> Iterator[dict[str, int]]:
    yield {}
    largest = int(min(size for _, _, size in config.training.batch_size))
    for micro_batch in range(num_devices, largest + 1, num_devices):
        yield {"training.micro_batch_size": micro_batch}


def _size(axis: int) -> int:
    return max(axis, 1)  # -1 is whatever is left
