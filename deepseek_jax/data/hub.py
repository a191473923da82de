"""Data sets by name, through the library `datasets` and streamed: nothing is downloaded but what is read.

    hf:NAME:SPLIT                         hf:roneneldan/TinyStories:train
    hf:NAME:CONFIGURATION:SPLIT           hf:allenai/c4:en:train
    hf:NAME@REVISION:...                  a branch, a tag or a commit instead of the newest state

NAME is one of the Hub, or a local folder of that layout. Rows come in the order of the data set. Tokenised caches are
known by the commit, so a data set that was changed is read again.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from deepseek_jax.data.corpus_files import all_files
from deepseek_jax.data.documents import CorpusError, Document, Problems, is_too_long, other_field, too_long
from deepseek_jax.data.extras import optional_library
from deepseek_jax.inputs import local_path, shown

PREFIX = "hf:"
INSTALL = "pip install datasets"
COMMIT_DIGITS = 40  # hexadecimal
SECONDS = 20  # to wait for the Hub's answer about a revision


class HubName(NamedTuple):
    """What a source that begins with "hf:" asks for."""

    name: str
    revision: str | None
    configuration: str | None
    split: str

    @property
    def is_local(self) -> bool:
        """Whether the data set is a folder of this machine."""
        return self.name.startswith(("/", "./", "../", "~"))


def parse(path: str) -> HubName:
    """Return the parts of "hf:NAME[@REVISION][:CONFIGURATION]:SPLIT".

    Raises:
        CorpusError: it has another form.
    """
    name, *others = path.removeprefix(PREFIX).split(":")
    name, at, revision = name.partition("@")
    if len(others) not in (1, 2) or not all((name, *others)) or (at and not revision):
        raise CorpusError(
            f"data source {shown(path)!r} must be {PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIGURATION:SPLIT, with"
            " @REVISION after NAME if you like, for example 'hf:allenai/c4:en:train'"
        )
    return HubName(name, revision or None, others[0] if len(others) == 2 else None, others[-1])


def check_library(path: str) -> None:
    """Refuse a source of a wrong form, or without the library `datasets`.

    Raises:
        CorpusError: with the right form, or how to install the library.
    """
    parse(path)
    optional_library("datasets", install=INSTALL)


def revision_key(path: str) -> Any:
    """Return what the content depends on: the commit, or the names, sizes and times of a local folder's files.

    Raises:
        CorpusError: the Hub does not know the data set, or cannot be reached.
    """
    hub = parse(path)
    if hub.is_local:
        return [file[:1] + file[2:] for file in all_files(local_path(hub.name, path))]
    return _commit(hub.name, hub.revision)


def read_hub(path: str, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield a document per row.

    A fault of the network ends the reading with CorpusError, under "skip" too: the rest of the rows is not one item.
    """
    hub = parse(path)
    datasets = optional_library("datasets", install=INSTALL)
    name = str(local_path(hub.name, path)) if hub.is_local else hub.name
    revision = None if hub.is_local else _commit(hub.name, hub.revision)
    row = 0
    try:
        rows = datasets.load_dataset(name, hub.configuration, split=hub.split, revision=revision, streaming=True)
        for row, record in enumerate(rows, 1):
            text = record.get(text_field)
            if isinstance(text, str) and is_too_long(text):
                problems.report(too_long(f"{shown(path)} row {row}"))
            elif isinstance(text, str):
                yield Document(f"{hub.name.rpartition('/')[2] if hub.is_local else hub.name}:{row}", text, 0)
            else:
                problems.report(
                    f"{shown(path)} row {row} has no text under text_field = {text_field!r} (it has keys"
                    f" {shown(str(sorted(record)))}){other_field(record, text_field)}"
                )
    except CorpusError:
        raise
    except Exception as error:  # `datasets` raises what its file formats and its network library raise
        raise CorpusError(
            f"{shown(path)} cannot be read after row {row}: {_described(error)}; check name, configuration, split"
            " and network, and start again"
        ) from error


@functools.cache
def _commit(name: str, revision: str | None) -> str:
    """Return the commit that a revision names now; the whole process uses that one."""
    if revision and len(revision) == COMMIT_DIGITS and set(revision) <= set("0123456789abcdef"):
        return revision
    hub = optional_library("huggingface_hub", install=INSTALL)
    try:
        return hub.HfApi().dataset_info(name, revision=revision, timeout=SECONDS).sha
    except Exception as error:  # as above
        raise CorpusError(
            f"the Hub does not tell the commit of the data set {shown(name)!r}: {_described(error)}; check the name and"
            f" the network, or name the commit: {PREFIX}NAME@COMMIT:SPLIT"
        ) from error


def _described(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {error}")
