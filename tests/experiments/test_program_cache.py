"""Entries of JAX's cache of compiled programs are whole, or not there."""

import os

import jax
import pytest
from jax._src import lru_cache

from experiments import program_cache

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


def test_jax_keeps_what_it_compiles_so(monkeypatch):
    """By the way that JAX itself calls it; the tests share a folder between workers."""
    names, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda partial, path: (names.append(os.path.basename(path)), replace(partial, path))
    )
    constant = int.from_bytes(os.urandom(3))  # a program that no cache has
    assert jax.jit(lambda x: x + constant)(1) == constant + 1
    assert any(name.startswith("jit__lambda") and name.endswith("-cache") for name in names), names
