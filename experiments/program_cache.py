"""Whole entries in JAX's cache of compiled programs, whoever else writes or reads it, and whoever is killed.

JAX 0.11 writes an entry under its last name. A process that reads it at that moment has the beginning of a program: it
warns ("Error reading persistent compilation cache entry", ZstdError) and compiles again. What a killed process left is
never replaced, so every later process warns. No result changes: a frame of Zstandard that is cut does not decompress.
"""

import os
import uuid

from jax._src import lru_cache  # JAX shows its files nowhere else

_put = lru_cache.LRUCache.put


def write_whole() -> None:
    """Let an entry of the cache have its name from when its last byte is written."""
    lru_cache.LRUCache.put = put


def put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
    """Keep a program, unless the cache has one of that key; in JAX's place.

    A cache with a bound for its size has a lock around it, and one in a bucket writes whole objects: JAX's own way.
    """
    folder = str(self.path)
    if self.eviction_enabled or "://" in folder:
        _put(self, key, value)
        return
    path, partial = os.path.join(folder, f"{key}-cache"), os.path.join(folder, f"partial-{uuid.uuid4().hex}")
    if os.path.exists(path):
        return
    try:
        with open(partial, "xb") as file:
            file.write(value)
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
