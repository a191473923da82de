"""The command prints the same bytes from the traced program and from the compiled one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


def printed(*arguments: str) -> list[str]:
    """Run the command on a mesh of eight; return its lines."""
    mesh = ("--config.mesh.data=2", "--config.mesh.node=2", "--config.mesh.expert=2")
    command = [sys.executable, "-m", "experiments.benchmarks.traffic", "--config=tests/training/nano.py:corpus", *mesh]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_one_layer_from_the_program_and_from_the_compiler(tmp_path):
    """Of 8 experts on 4 devices each token wants two on one device of each node: 2 copies, half of which stay."""
    np.save(tmp_path / "e.npy", np.tile([[0, 4]], (16, 1)))
    given = f"--experts={tmp_path / 'e.npy'}"
    traced, compiled = printed(given), printed(given, "--compiled", "--cpu_devices=8")
    assert "data 2 x node 2 x expert 2" in traced[0] and traced[0].endswith("traced")
    assert compiled[0] == traced[0].replace("traced", "compiled")
    cut = traced.index(next(line for line in traced if line.startswith("all layers")))
    # The backward pass hands rows on inside a node once more. Where both passes lie in one block, XLA does it once.
    again = next(i for i, line in enumerate(traced) if line.startswith("expert  backward  rows"))
    assert [line for i, line in enumerate(compiled[:cut]) if i not in (0, again)] == [
        line for i, line in enumerate(traced[:cut]) if i not in (0, again)
    ]
    once = next(line.split()[4] for line in traced if line.startswith("expert  forward   rows"))
    assert traced[again].split()[4] == str(2 * int(once)) and compiled[again].split()[4] in (once, str(2 * int(once)))
    rows = next(line.split() for line in traced if line.startswith("node    forward   rows"))
    assert rows[3] == "128"  # 2 copies x 1/2 x 32 FP32
    assert any(line.startswith("data    backward  gradients") for line in traced[cut:])
