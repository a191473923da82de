"""Runs of the command in processes of their own, on a small corpus."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[2]
DEADLINE = 600.0  # seconds for one process, on a loaded machine with nothing compiled


def write_corpus(folder: Path) -> Path:
    """Make a folder of sixty documents of random words."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("etaoinshrdlu"), size=size)) for size in generator.integers(2, 8, size=200)]
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(generator.choice(words, size=300)))
    return folder


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start `python *command`, its output appended to `log`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    if jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for its good end."""
    assert process.wait(DEADLINE) == 0, log.read_text()[-4000:]
