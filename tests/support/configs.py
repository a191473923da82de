"""The files of `configs/` by what they are: a run that begins with nothing, or a stage behind one."""

from pathlib import Path

_FILES = sorted((Path(__file__).parents[2] / "configs").glob("[!_]*.py"))
# With a section `posttraining`: `deepseek_jax.posttraining.settings` reads them, and tests/posttraining tests them.
STAGES = [path.stem for path in _FILES if "posttraining" in path.read_text()]
CONFIGS = [path.stem for path in _FILES if path.stem not in STAGES]
