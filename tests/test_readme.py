"""What the README points at exists, and its numbers follow from the code."""

import ast
import importlib
import math
import re
from pathlib import Path

import jax
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.model import transformer
from experiments.benchmarks import results_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def defined_names(path):
    """Return the functions, classes, `Class.method`s and module constants of a Python file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`([\w/]+\.py:[\w.]+)`", README))))
def test_each_named_function_exists(place):
    path, name = place.split(":")
    assert name in defined_names(ROOT / path)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_each_link_into_the_repository_resolves(link):
    assert link.startswith("https://") or (ROOT / link).exists()


def tree_paths():
    """Return the paths of the annotated tree: names ending in `/` open a folder, indentation closes it."""
    block = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    paths, folders = [], []
    for line in block[1].splitlines() if block else []:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


@pytest.mark.parametrize("path", tree_paths())
def test_each_path_of_the_tree_exists(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_the_tree_names_every_module():
    modules = {
        str(path.relative_to(ROOT)) for path in (ROOT / "deepseek_jax").rglob("*.py") if path.name != "__init__.py"
    }
    assert modules <= set(tree_paths())


def test_measurements_are_those_of_the_records():
    assert results_table.table() in README
    assert results_table.kernel_summary() in README
    assert results_table.KERNELS.read_text() == results_table.kernel_tables() + "\n"


BYTES_PER_PARAMETER = 4 + 2 + 2 + 4  # FP32 weight, two BF16 moments, FP32 gradient
USABLE = 0.8  # of a card's memory
CARDS = (24e9, 80e9, 141e9)


def fit_rows():
    """Return (config name, [parameters, state, cards of each size]) of the table of configs and cards."""
    table = README.partition("| Config |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", table, re.MULTILINE)
    return [(name, [cell.strip() for cell in cells.split("|")]) for name, cells in rows]


def in_units(value, units):
    """Return `value` as the table writes it: `units` are (size, text), largest first."""
    size, unit, decimals = next((size, unit, decimals) for size, unit, decimals in units if value >= size)
    return f"{value / size:.{decimals}f}{unit}"


@pytest.mark.parametrize(("name", "cells"), fit_rows(), ids=[name for name, _ in fit_rows()])
def test_the_table_of_cards_follows_from_the_config(name, cells):
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    mesh = jax.make_mesh((1,) * 5, ("pipe", "data", "node", "expert", "tensor"), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, _ = jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = BYTES_PER_PARAMETER * count
    expected = [
        in_units(count, ((1e9, "B", 3), (1e6, "M", 1))),
        in_units(state, ((1e12, " TB", 2), (1e9, " GB", 1), (1e6, " MB", 0))),
    ]
    assert cells == expected + [str(math.ceil(state / (USABLE * memory))) for memory in CARDS]


def test_the_table_has_every_config():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"} == {name for name, _ in fit_rows()}
