"""The flag `--config`: a Python file with `get_config()`, and overrides of single values.

    --config=configs/tiny.py                    a file
    --config=tests/training/nano.py:corpus      the text after the colon is the argument of get_config
    --config.model.num_layers=8                 one value; sections and places of tuples work too, as in
    --config.data.sources[0].path=corpus        `ml_collections.config_flags`

The type of a value is that of its field in `deepseek_jax.config`. So a misspelled key, a value of another type and a
file that is not a configuration are refused in one sentence, before anything else runs.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path
from ml_collections.config_flags.tuple_parser import TupleParser

from deepseek_jax.config import Config
from deepseek_jax.inputs import local_path, read_text, shown

flags.disclaim_key_flags()  # the flag belongs to the command that defines it

LARGEST_FILE = 1 << 20  # bytes of a configuration
EXAMPLE = "--config=configs/tiny.py"
OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]*)(=(?P<text>.*))?", re.DOTALL)
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Recipe:
    """The configuration that the command line names."""

    defined: typing.ClassVar["list[Recipe]"] = []  # the command's, if it has one
    overrides: typing.ClassVar[list[tuple[str, Any]]] = []  # key and value, as `take_overrides` found them

    def __init__(self, default: str | None, text: str, required: bool = False):
        """Define the flag.

        Args:
            default: path of the file where the flag is not given.
            text: its help.
            required: refuse a command line without it.
        """
        self._flag, self._required = flags.DEFINE_string("config", default, text), required
        self.defined.append(self)

    @property
    def is_default(self) -> bool:
        """Whether the command line names no file; single values may be given all the same."""
        return flags.FLAGS[self._flag.name].using_default_value

    @functools.cached_property
    def value(self) -> ConfigDict | None:
        """What `get_config` returned, with the overrides; None without `--config`.

        Raises:
            ValueError: there is no file, it is not a configuration, or an override does not fit it.
        """
        if self._flag.value is None:
            if self._required or self.overrides:
                raise ValueError(f"--config is missing; name a file with get_config(), such as {EXAMPLE}")
            return None
        return read(self._flag.value, self.overrides)


def read(text: str, overrides: list[tuple[str, Any]]) -> ConfigDict:
    """Return the configuration of `file` or `file:argument` with its overrides; as `Recipe.value`."""
    tree = _load(text)
    with tree.ignore_type():
        for key, value in overrides:
            _set(tree, key, value)
    return tree


def load() -> None:
    """Load the configuration of the command line, if the command takes one; as `Recipe.value`."""
    for defined in Recipe.defined:
        _ = defined.value


def take_overrides(argv: list[str]) -> list[str]:
    """Return the command line without its overrides, which `Recipe` will apply.

    Raises:
        ValueError: an override names an unknown key or has a value of the wrong type.
    """
    Recipe.overrides, rest, words = [], argv[:1], iter(argv[1:])
    for word in words:
        if word == "--":
            return [*rest, word, *words]
        found = OVERRIDE.fullmatch(word)
        if not found:
            rest.append(word)
            continue
        key, text = found["key"], found["text"]
        kind = _kind_of(key)
        if text is None and kind is bool:
            text = "false" if found["no"] else "true"
        elif found["no"]:
            raise ValueError(f"{shown(word)}: only keys that are true or false take --no; write --config.{key}=VALUE")
        elif text is None and (text := next(words, None)) is None:
            raise ValueError(f"--config.{key} has no value; write --config.{key}=VALUE")
        value = _parsed(key, kind, text)
        if isinstance(value, tuple) and key in dict(Recipe.overrides):  # given again: one more entry
            value = dict(Recipe.overrides)[key] + value
        Recipe.overrides.append((key, value))
    return rest


def _kind_of(key: str) -> Any:
    """Return the type of the value at a dotted key of `Config`."""
    try:
        parts = config_path.split(key)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"--config.{shown(key)} is not a key; write one such as --config.model.width=64") from error
    kind: Any = Config
    for part in parts:
        if dataclasses.is_dataclass(kind) and part in (fields := typing.get_type_hints(kind)):
            kind = fields[part]
        elif typing.get_origin(kind) is tuple and isinstance(part, int):
            inner = typing.get_args(kind)
            kind = inner[0] if len(inner) == 2 and inner[1] is Ellipsis else inner[min(part, len(inner) - 1)]
        else:
            raise ValueError(f"--config.{shown(key)}: there is no such key; {_nearest(key)}")
    return kind


def same_name(key: str) -> list[str]:
    """Return the dotted keys of `Config` whose last part is that of `key`."""
    return [known for known in _keys(Config) if known.rpartition(".")[2] == key.rpartition(".")[2]]


def _nearest(key: str) -> str:
    section = [known for known in _keys(Config) if known.rpartition(".")[0] == key.rpartition(".")[0]]
    close = (
        same_name(key)
        or difflib.get_close_matches(key, section, n=1, cutoff=0.8)
        or difflib.get_close_matches(key, _keys(Config), n=1)
    )
    return f"did you mean --config.{close[0]}?" if close else "configs/deepseek_v3.py has every key"


def _keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for name, inner in typing.get_type_hints(kind).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(inner):
            keys += _keys(inner, f"{prefix}{name}.")
    return keys


def _parsed(key: str, kind: Any, text: str) -> Any:
    """Return the text of an override as a value of its field."""
    wanted = getattr(kind, "__name__", "tuple")
    try:
        if kind is str:
            return text
        if kind is bool:
            return BOOLEANS[text.lower()]
        if kind is float:
            return float(text)
        if kind is int:
            return int(text, 16 if text.startswith("0x") else 10)
        if dataclasses.is_dataclass(kind):
            wanted = "dict"
            return ConfigDict(ast.literal_eval(text))
        wanted = "tuple"
        return TupleParser().parse(text)
    except (ValueError, TypeError, AttributeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"--config.{key}={shown(text)} must be {_FORMS[wanted]}") from error


_FORMS = {
    "bool": "true or false",
    "int": "a whole number, in digits",
    "float": "a number",
    "dict": "a section as a Python dict, in quotes",
    "tuple": "a Python tuple in quotes, such as '((\"constant\", 1.0, 8),)'",
}


def _set(tree: ConfigDict, key: str, value: Any) -> None:
    try:
        config_path.set_value(key, tree, value)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--config.{shown(key)} does not fit the file's configuration ({type(error).__name__}); name a key that it"
            " has"
        ) from error


def _load(text: str) -> ConfigDict:
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
    return ValueError(f"--config: {shown(str(path))} failed ({_told(error)}{where}); repair it")


def _told(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {shown(text)}" if text else type(error).__name__
