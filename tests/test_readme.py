"""What the README and `docs/` point at exists, and their numbers follow from the code and the records."""

import ast
import re
from pathlib import Path

import pytest

from docs import make_map
from experiments.benchmarks import memory_table, results_table
from tests.support.configs import CONFIGS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments" / "log.md"]
TEXTS = {path: path.read_text() for path in DOCUMENTS}
README, KERNELS, CHECKPOINTS, MEMORY = (
    TEXTS[ROOT / name] for name in ("README.md", "docs/kernels.md", "docs/checkpoints.md", "docs/memory.md")
)
LARGEST_README = 12_000  # bytes: who needs more reads docs/


def matches(pattern):
    """Return the (document relative to the root, match) pairs of a pattern with one group over all documents."""
    pairs = {
        (str(path.relative_to(ROOT)), match) for path, text in TEXTS.items() for match in re.findall(pattern, text)
    }
    assert pairs, f"no document has {pattern}"
    return sorted(pairs)


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


@pytest.mark.parametrize(("label", "target"), re.findall(r"\[`([\w/]+\.py:[\w.]+)`\]\(([^)]+)\)", README))
def test_each_idea_leads_to_its_function(label, target):
    path, name = label.split(":")
    assert target in (path, f"deepseek_jax/{path}") and name in defined_names(ROOT / target)


@pytest.mark.parametrize(("document", "place"), matches(r"(?<!\[)`([\w/]+\.py:[\w.]+)`"))
def test_each_named_function_exists(document, place):
    path, name = place.split(":")
    assert name in defined_names(ROOT / path)


def anchors(path):
    """Return the anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("document", "link"), matches(r"\]\(([^)\s]+)\)"))
def test_each_link_into_the_repository_resolves(document, link):
    if link.startswith("https://"):
        return
    path, _, anchor = link.partition("#")
    target = (ROOT / document).parent / path if path else ROOT / document
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize(("document", "module"), matches(r"python\s+-m\s+((?:experiments|pallas_kernels|docs)[\w.]*)"))
def test_each_command_exists(document, module):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_the_readme_is_short():
    assert len(README.encode()) <= LARGEST_README


def test_the_map_has_every_module_as_it_describes_itself():
    assert make_map.MAP.read_text() == make_map.map_text(), "docs/map.md is old; remake it: python -m docs.make_map"


def test_measurements_are_those_of_the_records():
    assert results_table.short_table() in README and results_table.table() in TEXTS[ROOT / "docs/measuring.md"]
    assert results_table.kernel_summary() in KERNELS
    assert results_table.conversion_table() in CHECKPOINTS
    assert results_table.KERNELS.read_text() == results_table.kernel_tables() + "\n"


@pytest.mark.slow
def test_the_table_of_chips_is_that_of_the_record():
    assert memory_table.table(memory_table.read_records()) in MEMORY


def test_the_table_has_every_config():
    phases = {"deepseek_v3_32k", "deepseek_v3_128k", "tiny_1k", "tiny_2k"}  # their weights are those of their bases
    assert set(CONFIGS) - phases == set(memory_table.CONFIGS)
