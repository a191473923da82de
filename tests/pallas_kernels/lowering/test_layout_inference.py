"""JAX's layout inference with our order of equal variables, and that no import puts it in place."""

import subprocess
import sys
from pathlib import Path

from jax.experimental.mosaic.gpu import constraints

from pallas_kernels.lowering import layout_inference

ROOT = Path(__file__).parents[3]


def test_equal_variables():
    a, b, c, d, e, f = map(constraints.Variable, "abcdef")
    pairs = [(a, b), (c, d), (d, e), (b, e)]
    system = constraints.ConstraintSystem(
        constraints=[constraints.Equals(*pair) for pair in pairs] + [constraints.NotOfType(f, int)]
    )
    found = layout_inference.equal_variables(system)
    assert {variable: set(equal) for variable, equal in found.items()} == {
        v: {a, b, c, d, e} - {v} for v in (a, b, c, d, e)
    }
    assert found == layout_inference.equal_variables(system)


def test_installed_twice_is_installed_once(monkeypatch):
    monkeypatch.setattr(constraints, "compute_transitively_equal_vars", constraints.compute_transitively_equal_vars)
    monkeypatch.setattr(layout_inference, "PRINTS_VARIABLES", (10**6,))
    for _ in range(2):
        layout_inference.install()
        assert constraints.compute_transitively_equal_vars is layout_inference.equal_variables


PATCHED_BY_IMPORTS = """
import importlib, pkgutil, sys
import flax.nnx, jax.experimental.pallas.mosaic_gpu, jax.experimental.pallas.tpu
from jax.experimental.mosaic.gpu import constraints, profiler

def functions():
    modules = [(name, vars(module)) for name, module in sys.modules.items() if name.split(".")[0] in ("jax", "flax")]
    return {(name, key): value for name, members in modules for key, value in members.items() if callable(value)}

before = functions()
import deepseek_jax.model.transformer, pallas_kernels
for module in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
    importlib.import_module(module.name)
after = functions()
assert ("jax.experimental.mosaic.gpu.constraints", "compute_transitively_equal_vars") in before
print([key for key in before if after[key] is not before[key]])
"""


def test_imports_patch_nothing():
    """A function of JAX or Flax is the same after all of `pallas_kernels` and the model have been imported."""
    done = subprocess.run(
        [sys.executable, "-c", PATCHED_BY_IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
