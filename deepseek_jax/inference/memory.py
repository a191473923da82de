"""Whether a cache fits the memory that is free, told before it is made."""

import os

import jax

from deepseek_jax.config import Execution, Model
from deepseek_jax.inference.cache import cache_bytes_per_token


def check_room(model: Model, execution: Execution, batch_size: int, num_slots: int, mesh: jax.sharding.Mesh) -> None:
    """Refuse a cache of `num_slots` tokens for each of `batch_size` sequences that the devices of `mesh` cannot hold.

    Raises:
        ValueError: with both sizes and the remedy.
    """
    num_bytes = cache_bytes_per_token(model, execution) * batch_size * num_slots
    if mesh.local_devices[0].platform != "cpu":  # the devices of a CPU share its memory
        num_bytes //= mesh.size
    free = free_bytes(mesh)
    if num_bytes > free:
        raise ValueError(
            f"the cache of {batch_size:,} sequences of {num_slots:,} tokens takes {num_bytes / 2**30:,.1f} GiB of a"
            f" device, and {free / 2**30:,.1f} GiB are free; decode fewer sequences at once (--batch_size), ask for"
            " fewer tokens (--max_new_tokens), or use more devices"
        )


def free_bytes(mesh: jax.sharding.Mesh) -> int:
    """Return the free memory of the first device as its allocator tells it; of a CPU all memory of the machine."""
    told = mesh.local_devices[0].memory_stats() or {}
    if "bytes_limit" in told:
        return told["bytes_limit"] - told.get("bytes_in_use", 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
