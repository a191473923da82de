"""What is declared in pyproject.toml is what the packages use."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import deepseek_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"deepseek_jax", "pallas_kernels", "experiments", "configs", "docs"}
UNDECLARED = {"wandb"}  # whoever wants it has it; a clear message names it otherwise
IMPORTED_BENEATH = {"flatbuffers"}  # by jax.export, when it writes and reads programs; JAX does not ask for it
PART_OF = {"jaxlib": "jax"}  # installed by it, at its version


def canonical(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def declared(*extras):
    """Return the distributions that the core, or the named extras, ask for."""
    lists = [PROJECT["optional-dependencies"][extra] for extra in extras] if extras else [PROJECT["dependencies"]]
    return {canonical(name) for names in lists for name in names}


def imported(*folders):
    """Return the distributions that the Python files of some folders import, anywhere in them."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - OURS
    return {canonical(PART_OF.get(name, distributions.get(name, [name])[0])) for name in foreign}


def test_the_declared_dependencies_are_the_imported_ones():
    used = imported("deepseek_jax", "pallas_kernels", "experiments", "configs")
    assert (used - declared("data", "serve") - UNDECLARED) | IMPORTED_BENEATH == declared()


def test_the_kernels_need_jax_alone():
    assert imported("pallas_kernels") <= {"jax", "numpy", "absl-py"}


def test_the_lock_has_every_declared_distribution():
    lock = {canonical(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1].isalpha()}
    extras = {extra: declared(extra) for extra in PROJECT["optional-dependencies"]} | {"core": declared()}
    assert {extra: sorted(names - lock) for extra, names in extras.items() if names - lock} == {}


def test_lock_and_project_name_no_registry():
    for name in ("requirements.lock", "pyproject.toml"):
        assert "index-url" not in (ROOT / name).read_text()


@pytest.mark.parametrize("package", ["deepseek_jax", "pallas_kernels"])
def test_type_checkers_read_the_annotations(package):
    assert (ROOT / package / "py.typed").exists()


def test_there_is_one_version():
    assert PROJECT["dynamic"] == ["version"] and re.fullmatch(r"\d+\.\d+\.\d+", deepseek_jax.__version__)
    assert f'version: "{deepseek_jax.__version__}"' in (ROOT / "CITATION.cff").read_text()
