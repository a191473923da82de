"""Build the documentation as a site: `python -m docs.make_site [FOLDER]`, by default into `site/`.

The pages are the Markdown files of the repository, which are read on GitHub and in an editor as they are. A copy of
them, with a page per module added, is what mkdocs sees. There, a link to a module leads to its API page, a link to any
other file to a copy of it. Nothing is imported but the documentation's own tools: docstrings are read from the source.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "experiments/log.md", "experiments/results/*.md")
LIBRARIES = ("deepseek_jax", "pallas_kernels")
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")


def main() -> None:
    """Parse the folder's name and build."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=ROOT / "site", type=Path, help="where the site goes")
    folder = parser.parse_args().folder.absolute()
    with tempfile.TemporaryDirectory() as pages:
        copy_pages(Path(pages))
        where = {"DOCS_FOLDER": pages, "SITE_FOLDER": str(folder), "REPOSITORY": str(ROOT)}
        where["NO_MKDOCS_2_WARNING"] = "1"  # of the theme, about an mkdocs that pyproject.toml excludes
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "docs/mkdocs.yml")]
        subprocess.run(command, env=os.environ | where, check=True)
    print(f"{folder / 'index.html'}")


def copy_pages(pages: Path) -> None:
    """Fill `pages` with the Markdown files, what they link to, and a page per module."""
    modules = {path.relative_to(ROOT).as_posix(): module_of(path) for path in _sources()}
    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        page = pages / path.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(LINK.sub(lambda link, path=path: _link(link, path, pages, modules), path.read_text()))
    api = pages / "api"
    api.mkdir()
    for name in modules.values():
        (api / f"{name}.md").write_text(f"::: {name}\n")
    (api / "index.md").write_text(api_index(modules))


def api_index(modules: dict[str, str]) -> str:
    """Return the page that lists every module with its first line."""
    lines = [
        f"- [`{name}`]({name}.md): {(ast.get_docstring(ast.parse((ROOT / path).read_text())) or '').partition('\n')[0]}"
        for path, name in modules.items()
    ]
    return "# API\n\nEvery module of the two libraries, from its docstrings.\n\n" + "\n".join(lines) + "\n"


def module_of(path: Path) -> str:
    """Return the dotted name of a Python file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources() -> list[Path]:
    return sorted(path for library in LIBRARIES for path in (ROOT / library).rglob("*.py"))


def _link(link: re.Match, page: Path, pages: Path, modules: dict[str, str]) -> str:
    """Return the link as the site needs it; what it leads to is copied where it is no page."""
    target = link[2]
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    path = (page.parent / target).resolve()
    name = path.relative_to(ROOT).as_posix()
    here = page.parent.relative_to(ROOT)
    if name in modules:
        return f"{link[1]}{os.path.relpath(f'api/{modules[name]}.md', here)})"
    if path.is_dir():
        return f"{link[1]}{os.path.relpath('docs/map.md', here)})"
    if path.suffix != ".md":
        copy = pages / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return link[0]


if __name__ == "__main__":
    main()
