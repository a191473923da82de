"""The recipe that an import writes: Python that does nothing but return the configuration."""

import shlex
from pathlib import Path

import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.huggingface import imported_recipe

NAMES = [
    'a"""\nimport pathlib; pathlib.Path("ran").touch()\n"""',
    "b'''\\",
    "c\\x\\N{",
    "{d} {0}",
    "e\r\n\x1b[31m\u2028 caf\udce9 ☃",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_text(name, tmp_path, monkeypatch):
    """Whatever the checkpoint's folder is called, the file is Python, runs nothing else and gives the config back."""
    monkeypatch.chdir(tmp_path)
    config = from_config_dict(tiny.get_config())
    config = config.with_(name=name, training={"initial_weights": f"/models/{name}"})
    source = imported_recipe.source(config)
    source.encode()  # UTF-8, even where the name is not
    scope = {}
    exec(compile(source, "config.py", "exec"), scope)
    assert from_config_dict(scope["get_config"]()) == config
    assert not list(tmp_path.iterdir())


def test_the_printed_command_is_one_for_a_shell():
    words = shlex.split(imported_recipe.training_command(Path("/runs/my 'run'; ls")))
    assert words[3:] == ["--config=/runs/my 'run'; ls/config.py", "--workdir=/runs/my 'run'; ls"]
