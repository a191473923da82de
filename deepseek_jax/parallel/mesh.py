"""The mesh.

A program here is a mesh, a layout and a step. Every parameter has one `PartitionSpec` in `parameters.PARAMETERS`; its
gradient, its moments and its average lie the same way. Batches are split over `ROWS`, and their sequences over
`context` (`parallel.context`). Routed experts live on (`node`, `expert`); everything else is split over all of these,
`TOKENS`.

The train step runs forward and backward inside one `jax.shard_map` over the whole mesh, with varying-axes checks on:
model code sees local arrays and calls its collectives. The alternative is explicit sharding with one shard_map island
per weight. Its glue (embedding lookups, scan carries, reshapes of sharded dims) needs more care than the collectives it
hides, and it reduces a gradient per island and micro-batch. With one island a gather is a function call. ZeRO-3 calls
it per layer, ZeRO-1 once per step; that is their only difference, and the layout table does not change.
"""

import itertools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from deepseek_jax import config as config_lib
from deepseek_jax.parallel.stages import check_pipeline
from deepseek_jax.parameters import CONTEXT, EXPERTS, ROWS, TOKENS
from pallas_kernels import GROUP
from pallas_kernels.lowering import manual_axes

AXES = ("pipe", *TOKENS, "tensor")
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh  # of devices, or of sizes alone


class MeshMisfit(ValueError):
    """The sizes of a mesh do not multiply to the number of devices; `fixed` is a number to which they do."""

    def __init__(self, message: str, fixed: int):
        """Keep `fixed` beside the message."""
        super().__init__(message)
        self.fixed = fixed


def make_mesh(sizes: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Make the mesh of `sizes` over `devices` (all of them by default).

    A TPU's torus has physical axes of its own (8 x 4 x 4 for 128 chips). JAX lays an axis of the mesh along whole ones,
    and refuses 2 x 8 x 8 there. Such a mesh splits a physical axis: neighbours on the mesh are then farther apart.

    Raises:
        ValueError: as `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    try:
        shape = mesh_shape(sizes, len(devices))
    except MeshMisfit as error:  # a plan refuses such a mesh too, but has devices of no machine to simulate
        raise ValueError(f"{error}, or simulate them with --cpu_devices={error.fixed}") from error
    try:
        mesh = jax.make_mesh(tuple(shape.values()), AXES, devices=devices)
    except NotImplementedError:
        logging.info("mesh %s: axes of the torus are split between axes of the mesh", shape)
        split = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
        mesh = jax.sharding.Mesh(split, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))
    if devices[0].platform == "cpu" and len({device.process_index for device in devices}) > 1:
        connect(mesh)
    return mesh


def connect(mesh: jax.sharding.Mesh) -> list[jax.Array]:
    """Sum over every group of axes once, while all processes are here; return the sizes of the groups.

    Gloo carries collectives between the processes of CPUs. It gives a group of devices 30 s, which nothing can change,
    from the first process that reaches its first collective to the last. A step may compile for longer in one process:
    on CPUs JAX's cache of programs serves process 0 only (the others have other keys, and write nothing).
    """
    axes = [axis for axis in AXES if mesh.shape[axis] > 1]
    groups = [group for size in range(1, len(axes) + 1) for group in itertools.combinations(axes, size)]
    rests = [jax.P(tuple(axis for axis in axes if axis not in group)) for group in groups]
    one = jax.NamedSharding(mesh, jax.P(tuple(axes)))
    ones = jax.make_array_from_callback((mesh.size,), one, lambda _: np.ones(1, np.int32))
    add = jax.shard_map(
        lambda x: [jax.lax.psum(x, group) for group in groups], mesh=mesh, in_specs=one.spec, out_specs=rests
    )
    return jax.block_until_ready(jax.jit(add)(ones))


def mesh_shape(sizes: config_lib.Mesh, num_devices: int) -> dict[str, int]:
    """Return the size of every axis for `num_devices` devices.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or a reserved axis is not 1.
    """
    shape = {axis: getattr(sizes, axis) for axis in AXES}
    if shape["tensor"] != 1:
        raise ValueError(
            f"config.mesh.tensor = {shape['tensor']}: this axis is reserved and not built yet; set it to 1"
        )
    given = dict(shape)
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise ValueError(f"config.mesh = {shape}: sizes are positive, and at most one is -1")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if free:
        shape[free[0]] = num_devices // fixed
    if math.prod(shape.values()) != num_devices:
        raise MeshMisfit(_misfit(given, fixed, num_devices, bool(free)), fixed)
    return shape


def _misfit(sizes: dict[str, int], fixed: int, num_devices: int, free: bool) -> str:
    """Return the refusal of mesh axes whose fixed sizes multiply to `fixed`."""
    if free:
        large = {axis: size for axis, size in sizes.items() if size > 1}
        named = ", ".join(f"config.mesh.{axis} = {size}" for axis, size in large.items())
        return (
            f"{named} does not fit {num_devices} devices: it must divide their number;"
            f" {_nearest_axes(large, num_devices)}, or use a multiple of {fixed} devices"
        )
    rest = {axis: fixed // size for axis, size in sizes.items()}
    whole = [f"{axis}={num_devices // n}" for axis, n in rest.items() if sizes[axis] > 1 and num_devices % n == 0]
    return (
        f"config.mesh = {sizes} does not fit {num_devices} devices; make the axes multiply to {num_devices}"
        f"{''.join(f', for example mesh.{one}' for one in whole[:1])}, set mesh.data=-1, or use {fixed} devices"
    )


def _nearest_axes(sizes: dict[str, int], num_devices: int) -> str:
    """Return the advice to change one of the axes: the nearest sizes with which all of them divide the devices."""
    found = []
    for axis, size in sizes.items():
        rest = math.prod(sizes.values()) // size
        fitting = [n for n in range(1, num_devices + 1) if num_devices % (n * rest) == 0]
        if fitting:
            found.append(f"{axis} = {nearest(size, fitting)}")
    return f"the nearest that does is {', or '.join(found)}" if found else "lower it"


def nearest(value: int, fitting: Iterable[int]) -> str:
    """Return the nearest of `fitting` below and above `value`, as words: "4", or "4 or 8"."""
    fitting = set(fitting)
    sides = max((n for n in fitting if n < value), default=None), min((n for n in fitting if n > value), default=None)
    return " or ".join(str(n) for n in sides if n is not None)


def nearest_multiples(value: int, step: int) -> str:
    """Return the nearest multiples of `step` below and above `value`, as words; 0 is none."""
    return nearest(value, {n for n in (value // step * step, -(-value // step) * step) if n})


def check_fit(config: config_lib.Config, mesh: AnyMesh) -> None:
    """Refuse a model or batch that the mesh cannot split evenly; the message names the dim, the axes and the remedy."""
    rows = axis_size(mesh, ROWS)
    check_pipeline(config, dict(mesh.shape))
    check_model_fit(config.model, mesh)
    _check_split("training.micro_batch_size", config.training.micro_batch_size, rows, mesh)
    size, parts = config.training.micro_batch_size, config.execution.interleave
    if size % (rows * parts):
        raise ValueError(
            f"config.execution.interleave = {parts} does not divide the {size // rows} rows that"
            f" training.micro_batch_size = {size} leaves to each of {rows} devices; the nearest that can be is"
            f" {nearest_multiples(size, rows * parts)}, or use execution.interleave = 1"
        )
    check_context(config, mesh)
    tokens = size // (rows * parts) * config.data.sequence_length // mesh.shape[CONTEXT]
    if config.execution.precision == "fp8" and tokens % GROUP:
        of_parts = f" and {parts} parts" if parts > 1 else ""
        fitting = nearest_multiples(size, _fp8_rows(config, rows * parts, mesh.shape[CONTEXT]))
        raise ValueError(
            f"config.training.micro_batch_size = {size} leaves {tokens} tokens to each of {axis_size(mesh, TOKENS)}"
            f" devices{of_parts}; in FP8 {GROUP} tokens share the scale of a weight gradient: make it a multiple of"
            f" {GROUP}, by data.sequence_length or training.micro_batch_size ({fitting}), or use execution.precision ="
            " 'bf16'"
        )


def _fp8_rows(config: config_lib.Config, rows: int, context: int) -> int:
    """Return the smallest micro-batch of which each of `rows` devices, or their parts, has a multiple of 128 tokens."""
    return rows * (GROUP // math.gcd(GROUP, config.data.sequence_length // context))


def check_context(config: config_lib.Config, mesh: AnyMesh) -> None:
    """Refuse sequences that the devices of `context` cannot share: each has two chunks of one size."""
    devices, length = mesh.shape[CONTEXT], config.data.sequence_length
    if devices > 1 and length % (2 * devices):
        raise ValueError(
            f"config.data.sequence_length = {length} cannot be cut into {2 * devices} chunks, two for each of"
            f" {devices} devices of config.mesh.context; the nearest that can is"
            f" {nearest_multiples(length, 2 * devices)}, or use mesh.context = 1"
        )


def check_model_fit(model: config_lib.Model, mesh: AnyMesh) -> None:
    """Refuse a model whose routed experts the mesh cannot share evenly; every other dim lies on any mesh."""
    if model.num_moe_layers:
        _check_split("model.num_experts", model.num_experts, axis_size(mesh, EXPERTS), mesh)


def _check_split(name: str, size: int, parts: int, mesh: AnyMesh) -> None:
    if size % parts:
        field = name.rpartition(".")[2]
        raise ValueError(
            f"config.{name} = {size} cannot be split over {parts} devices of mesh {dict(mesh.shape)}; the nearest"
            f" {field} that can is {nearest_multiples(size, parts)}: change it or the mesh, whose parts must divide it"
            f" ({nearest(parts, _divisors(size))})"
        )


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def axis_size(mesh: AnyMesh, axes: Sequence[str]) -> int:
    """Return the number of devices along `axes` together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return what bit equality depends on: XLA splits reductions by core count on CPUs, by device kind on GPUs."""
    device = mesh.devices.flat[0]
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "mesh": {axis: size for axis, size in mesh.shape.items() if axis != CONTEXT or size > 1},  # it came later
        "processes": jax.process_count(),
    }


def vary(x: jax.Array, like: jax.Array) -> jax.Array:
    """Let `x` vary over the manual axes that `like` varies over.

    A loop needs it: its carry must start with the type that it ends with.
    """
    return manual_axes.vary(x, manual_axes.varies_over(like))
