"""Pinned memory of the host: arrays that lie there, laid out over the mesh like any other.

A device reads and writes it over its link to the host, an H200 at 53.5 GB/s in each direction (measured). Arithmetic
reads none of it: what lies there is brought to the device first. On CPUs it is the same memory under another name.
"""

from typing import Any

import jax

HOST_KIND = "pinned_host"


def to_host(tree: Any) -> Any:
    """Return the same arrays in host memory, each in its layout; call it under `jax.jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    """Return the same arrays in the memory of their devices; call it under `jax.jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def check_host_memory(mesh: jax.sharding.Mesh, key: str, value: str, instead: str) -> None:
    """Refuse a setting that needs host memory where the devices of `mesh` cannot reach any.

    Raises:
        ValueError: names the setting, `key` = `value`, and what to use instead.
    """
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kinds and HOST_KIND not in kinds:  # a card that is only compiled for tells of none
        raise ValueError(
            f"{key} = {value!r} needs memory of the kind {HOST_KIND!r}, and {device.device_kind} has {kinds}; use"
            f" --config.{key}={instead}"
        )
