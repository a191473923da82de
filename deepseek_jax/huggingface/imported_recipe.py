"""The recipe of a run that begins with a checkpoint: a config file in Python, and the command that trains with it.

The file is run by whoever trains, so it holds nothing of the checkpoint but numbers and texts as Python writes them
(`repr`): the name of a folder may have quotes, backslashes or line breaks in it.
"""

import pprint
import shlex
from pathlib import Path

from deepseek_jax.config import Config, to_dict

FILE = "config.py"
TEXT = '''"""The recipe of a run that began with a released checkpoint; `training.initial_weights` says which."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the configuration."""
    return ConfigDict(
{config}
    )
'''


def source(config: Config) -> str:
    """Return the text of a config file whose `get_config` gives `config`."""
    return TEXT.format(config=pprint.pformat(to_dict(config), sort_dicts=False))


def training_command(workdir: Path) -> str:
    """Return the command that trains with the recipe in `workdir`, for a shell."""
    arguments = [f"--config={workdir / FILE}", f"--workdir={workdir}"]
    return shlex.join(["python", "-m", "experiments.train", *arguments])
