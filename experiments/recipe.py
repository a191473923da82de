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
import os
import re
import typing
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path
from ml_collections.config_flags.tuple_parser import TupleParser

from deepseek_jax.config import Config, Source
from deepseek_jax.config_checks import present
from deepseek_jax.inputs import shown
from experiments.config_file import load_file

flags.disclaim_key_flags()  # the flag belongs to the command that defines it

EXAMPLE = "--config=configs/tiny.py"
OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]*)(=(?P<text>.*))?", re.DOTALL)
ALIASES = {  # what others call a key
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "beta1": "optimizer.b1",
    "beta2": "optimizer.b2",
    "seq_len": "data.sequence_length",
    "hidden_size": "model.width",
}
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Recipe:
    """The configuration that the command line names."""

    defined: typing.ClassVar["list[Recipe]"] = []  # the command's, if it has one
    overrides: typing.ClassVar[list[tuple[str, Any]]] = []  # key and value, as `take_overrides` found them

    def __init__(self, default: str | None, text: str, required: bool = False, schema: type = Config):
        """Define the flag.

        Args:
            default: path of the file where the flag is not given.
            text: its help.
            required: refuse a command line without it.
            schema: `Config`, or a subclass with further sections.
        """
        self.schema = schema
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
    tree = load_file(text)
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


def _schema() -> type:
    """Return the type whose fields are the keys of the command's configurations."""
    return Recipe.defined[-1].schema if Recipe.defined else Config


def _kind_of(key: str) -> Any:
    """Return the type of the value at a dotted key of `Config`."""
    try:
        parts = config_path.split(key)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"--config.{shown(key)} is not a key; write one such as --config.model.width=64") from error
    kind: Any = _schema()
    for part in parts:
        kind = present(kind)
        if dataclasses.is_dataclass(kind) and part in (fields := typing.get_type_hints(kind)):
            kind = fields[part]
        elif typing.get_origin(kind) is tuple and isinstance(part, int):
            inner = typing.get_args(kind)
            kind = inner[0] if len(inner) == 2 and inner[1] is Ellipsis else inner[min(part, len(inner) - 1)]
        else:
            raise ValueError(f"--config.{shown(key)}: there is no such key; {_nearest(key)}")
    return present(kind)


def same_name(key: str) -> list[str]:
    """Return the dotted keys of `Config` whose last part is that of `key`, or what others call so."""
    last = key.rpartition(".")[2]
    return [known for known in _keys(_schema()) if known.rpartition(".")[2] == last] or [
        known for known in _keys(_schema()) if known == ALIASES.get(last)
    ]


def _nearest(key: str) -> str:
    section, _, last = key.rpartition(".")
    keys = [known.rpartition(".") for known in _keys(_schema())]
    names = [name for inside, _, name in keys if section and inside == section]
    close = (
        same_name(key)
        or [f"{section}.{name}" for name in difflib.get_close_matches(last, names, n=1)]
        or difflib.get_close_matches(key, [] if names else _keys(_schema()), n=1, cutoff=0.8)
    )
    if close:
        return f"did you mean --config.{close[0]}?"
    return f"{section} has {', '.join(names)}" if names else "configs/deepseek_v3.py has every key"


def _keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for name, inner in typing.get_type_hints(kind).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(inner := present(inner)):
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
        if kind == tuple[Source, ...]:
            wanted = "sources"
            if not text.startswith(("(", "[", "{", '"', "'")):
                return _one_path(text)
        return TupleParser().parse(text)
    except (ValueError, TypeError, AttributeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"--config.{key}={shown(text)} must be {_FORMS[wanted]}") from error


def _one_path(text: str) -> tuple[str]:
    if "," in text and not os.path.exists(text):
        raise ValueError("several paths without quotes")
    return (text,)


_FORMS = {
    "bool": "true or false",
    "int": "a whole number, in digits",
    "float": "a number, such as 1e6",
    "dict": "a section as a Python dict, in quotes",
    "sources": 'a path, or a Python tuple in quotes, such as \'("A", "B")\'',
    "tuple": "a Python tuple in quotes, such as '((\"constant\", 1.0, 8),)'",
}


def _set(tree: ConfigDict, key: str, value: Any) -> None:
    """Set a key that `take_overrides` knows; a file need not name it, if it has the section."""
    section, _, name = key.rpartition(".")
    try:
        inside = config_path.get_value(section, tree) if section else tree
        if isinstance(inside, ConfigDict) and name.isidentifier() and name not in inside:
            with inside.unlocked():
                inside[name] = value
        else:
            config_path.set_value(key, tree, value)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--config.{shown(key)} does not fit the file's configuration ({type(error).__name__}); name a key that it"
            " has"
        ) from error
