"""The Python file that `--config` names: it is run, and its `get_config` called.

A file that fails is refused in one sentence, with its own line.
"""

import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.inputs import local_path, read_text, shown

LARGEST_FILE = 1 << 20  # bytes
# What a ConfigDict says when a file gives a key a value of another type.
OTHER_TYPE = re.compile(
    r"(?s)Could not override field '(?P<key>\w+)'.*?\. (?P<value>.*) is of original type <class '(?P<was>\w+)'> and"
    r" cannot be casted to type <class '(?P<wanted>\w+)'>"
)


def load_file(text: str) -> ConfigDict:
    """Run the file of `--config` and return its configuration."""
    name, argument = _split(text)
    path = local_path(name, "--config")
    where = shown(str(path))
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    program = _compiled(path)
    sys.modules[module.__name__] = module  # where dataclasses of the file look themselves up
    try:
        exec(program, module.__dict__)
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(
            f"--config: {where} has no get_config(); write one that returns a ConfigDict, as in configs/tiny.py"
        )
    return _called(module.get_config, path, argument)


def _compiled(path: Path) -> types.CodeType:
    where = shown(str(path))
    try:
        source = read_text(path, LARGEST_FILE)
    except ValueError as error:
        raise ValueError(f"--config: {error}; give a Python file such as configs/tiny.py") from error
    if path.suffix == ".json" or source.lstrip().startswith("{"):
        raise ValueError(f"--config: {where} is JSON; give a Python file with get_config(), such as configs/tiny.py")
    try:
        return compile(source, str(path), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(
            f"--config: {where} is not Python ({_told(error)}{line}); give a Python file with get_config(), such as"
            " configs/tiny.py"
        ) from error


def _called(get_config: Any, path: Path, argument: list[str]) -> ConfigDict:
    """Call `get_config` with the text after the colon, if there is one."""
    where = shown(str(path))
    try:
        inspect.signature(get_config).bind(*argument)
    except (TypeError, ValueError) as error:
        remedy = "drop the text after the colon" if argument else f"give it: --config={where}:ARGUMENT"
        raise ValueError(f"--config: get_config of {where} takes another number of arguments; {remedy}") from error
    try:
        tree = get_config(*argument)
        if isinstance(tree, dict):
            tree = ConfigDict(tree)
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from error
    if not isinstance(tree, ConfigDict):
        raise ValueError(f"--config: get_config of {where} returned {type(tree).__name__}; return a ConfigDict")
    return tree.lock()


def _split(text: str) -> tuple[str, list[str]]:
    """Split `file:argument`; the name of a file that exists may have a colon itself."""
    places = [found.start() for found in re.finditer(":", text)]
    for place in [len(text), *places]:
        try:
            if Path(text[:place]).is_file():
                return text[:place], [text[place + 1 :]] if place < len(text) else []
        except (OSError, ValueError):  # too long, or a NUL: `local_path` says so
            break
    if "://" in text or not places:
        return text, []
    return text[: places[0]], [text[places[0] + 1 :]]


def _failed(path: Path, error: BaseException) -> ValueError:
    """Return the refusal of a file that raises, with its own line."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    where = f", line {lines[-1]}" if lines else ""
    if found := OTHER_TYPE.fullmatch(str(error)):
        key, value, was, wanted = (shown(found[name]) for name in ("key", "value", "was", "wanted"))
        forms = {"sources": f'("{value}",)', "tuple": f'(("constant", 1.0, {value}),)'}
        remedy = forms.get(key) or forms.get(wanted) or f"a value of type {wanted}"
        return ValueError(
            f"--config: {shown(str(path))}{where}: {key} = {value} is of type {was} and must be of type {wanted}; write"
            f" {remedy}"
        )
    return ValueError(f"--config: {shown(str(path))} failed ({_told(error)}{where}); repair it")


def _told(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {shown(text)}" if text else type(error).__name__
