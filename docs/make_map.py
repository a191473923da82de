"""Write `docs/map.md`, the first sentence of every module: `python -m docs.make_map`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAP = ROOT / "docs" / "map.md"
PACKAGES = ("configs", "deepseek_jax", "pallas_kernels", "experiments", "docs")
HEAD = """# Map

Every module, with the first sentence of its docstring. `python -m docs.make_map` writes this file; do not edit it.

The [README](../README.md#where-each-idea-of-the-report-lives) says where each idea of the report lives. `tests/`
mirrors these folders; `tests/golden/` holds tiny checkpoints and what Hugging Face transformers computes from them.
`experiments/results/` holds the records of measurements, [`experiments/log.md`](../experiments/log.md) what was tried,
and [`experiments/notebooks/`](../experiments/notebooks/quickstart.ipynb) a first run from Python.
"""


def map_text() -> str:
    """Return the whole of `docs/map.md`."""
    return HEAD + "".join(_section(folder) for package in PACKAGES for folder in _folders(ROOT / package))


def _folders(package: Path) -> Iterator[Path]:
    """Yield the folders of a package that have modules, parents first."""
    yield from sorted({path.parent for path in package.rglob("*.py")})


def _section(folder: Path) -> str:
    name = folder.relative_to(ROOT)
    about = _first_sentence(folder / "__init__.py") if (folder / "__init__.py").exists() else ""
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    lines = [f"- [`{path.name}`](../{name}/{path.name}): {_first_sentence(path)}" for path in modules]
    return "\n".join([f"\n## {name}/", *(["", about] if about else []), *(["", *lines] if lines else []), ""])


def _first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring in one line."""
    paragraph = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0].split())
    if not paragraph:
        raise ValueError(f"{path} has no docstring; write one whose first sentence says what the module is")
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph)[0]


if __name__ == "__main__":
    MAP.write_text(map_text())
