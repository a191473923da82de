"""Entries of JAX's cache of compiled programs are whole, or not there."""

import os
import time

import jax
import pytest
from jax._src import lru_cache
from jax.experimental.compilation_cache import compilation_cache

from experiments import program_cache
from tests.support import compiling

ENTRY = b"a compiled program" * 1000


@pytest.fixture
def cache(tmp_path):
    return lru_cache.LRUCache(str(tmp_path), max_size=-1)


def test_nobody_reads_a_part_of_an_entry(cache, monkeypatch):
    """All of it is written before it has its name; the first of two that compiled the same stays."""
    seen, replace = [], os.replace

    def renamed(partial, path):
        with open(partial, "rb") as file:
            seen.append((cache.get("key"), file.read()))
        replace(partial, path)

    monkeypatch.setattr(os, "replace", renamed)
    cache.put("key", ENTRY)
    assert seen == [(None, ENTRY)] and cache.get("key") == ENTRY
    cache.put("key", b"another")
    assert cache.get("key") == ENTRY and len(os.listdir(cache.path)) == 1


def test_what_ends_a_write_leaves_nothing(cache, monkeypatch):
    def interrupted(partial, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put("key", ENTRY)
    assert cache.get("key") is None and not os.listdir(cache.path)


def test_a_cache_with_a_bound_is_jaxs_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(program_cache, "_put", lambda cache, key, value: seen.append(key))
    bounded = lru_cache.LRUCache(str(tmp_path), max_size=1 << 20)
    bounded.put("key", ENTRY)
    assert seen == ["key"] and not (tmp_path / "key-cache").exists()


@pytest.fixture
def own_folder(tmp_path):
    """A new folder for what JAX compiles, in place of the one that all tests share."""
    shared = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", shared)
    compilation_cache.reset_cache()


def test_jax_keeps_what_it_compiles_so(own_folder, monkeypatch):
    """By the way that JAX itself calls it; the tests share a folder between workers."""
    names, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda partial, path: (names.append(os.path.basename(path)), replace(partial, path))
    )
    assert jax.jit(lambda x: x + 2)(1) == 3
    kept = [name for name in names if name.startswith("jit__lambda") and name.endswith("-cache")]
    assert kept and all((own_folder / name).is_file() for name in kept), names


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Not what another process may be writing, and no entry."""
    for name in ("partial-old", "partial-new", "key-cache"):
        (tmp_path / name).touch()
    for name in ("partial-old", "key-cache"):
        os.utime(tmp_path / name, (0, time.time() - compiling.LEFT_OVER - 60))
    compiling.remove_left_over(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["key-cache", "partial-new"]
