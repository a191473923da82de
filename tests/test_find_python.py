"""`.ci/find_python` on machines made of a folder: it runs candidates instead of trusting their names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "find_python"
WORKS = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
SHIM = '#!/bin/sh\necho "pyenv: python: command not found" >&2\nexit 127\n'
OLD = "#!/bin/sh\nexit 1\n"  # what the version check of an older Python does


@pytest.fixture
def machine(tmp_path):
    """Return a function that finds a Python on a machine with the given `{path: script}` files.

    The machine has nothing else of Python's or uv's.
    """
    for tool in ("bash", "ls", "sort"):
        link = tmp_path / "bin" / tool
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(shutil.which(tool))

    def find(files, **variables):
        for name, script in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(script)
            path.chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), **variables}
        return subprocess.run(
            [shutil.which("bash"), SCRIPT], env=environment, capture_output=True, text=True, timeout=600
        )

    return find


def traced(tmp_path, name):
    """Return a working interpreter that leaves a trace of having been the one that printed its path."""
    return f'#!/bin/sh\necho {name} >>"{tmp_path}/tried"\n' + WORKS.split("\n", 1)[1]


def test_a_shim_that_fails_is_passed_over(machine):
    result = machine({"bin/python3.14": SHIM, "bin/python3.13": OLD, "bin/python3": WORKS})
    assert result.returncode == 0 and os.path.samefile(result.stdout.strip(), sys.executable)


def test_newest_first_then_pyenv(machine, tmp_path):
    machine({"bin/python3.13": traced(tmp_path, "3.13"), "bin/python3.12": traced(tmp_path, "3.12")})
    assert (tmp_path / "tried").read_text() == "3.13\n"


def test_pyenv_versions_are_sorted_as_versions(machine, tmp_path):
    versions = {f".pyenv/versions/{name}/bin/python": traced(tmp_path, name) for name in ("3.9.18", "3.12.1", "3.13.0")}
    assert machine({"bin/python3": OLD, **versions}).returncode == 0
    assert (tmp_path / "tried").read_text() == "3.13.0\n"


def test_a_named_python_comes_first_and_is_not_dropped_silently(machine, tmp_path):
    machine(
        {"mine": traced(tmp_path, "mine"), "bin/python3.14": traced(tmp_path, "3.14")}, PYTHON=str(tmp_path / "mine")
    )
    assert (tmp_path / "tried").read_text() == "mine\n"
    result = machine({"old": OLD, "bin/python3.14": WORKS}, PYTHON=str(tmp_path / "old"))
    assert result.returncode == 0 and f"PYTHON={tmp_path / 'old'}" in result.stderr


def test_without_a_python_one_line_says_what_to_install(machine):
    result = machine({"bin/python3": OLD})
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "install" in result.stderr and "3.12" in result.stderr
