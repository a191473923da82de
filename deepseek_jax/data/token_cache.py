"""The corpus is tokenised once; after that its ids are read through memory maps.

A folder `tokens-<key>` in the workdir holds, for every source and split, the files of `token_files`. The key covers all
that the ids depend on: the tokenizer, the files (their names inside the source, size, time of change; not where the
source lies) and the data settings. The folder is written under another name and renamed when it is complete, so a
process that is killed leaves a complete cache or none. Processes that share a workdir write the same bytes, and the
first to finish wins. A damaged cache is made again.
"""

import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import shutil
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.array_records import id_fault
from deepseek_jax.data.documents import Document, Problems
from deepseek_jax.data.encoding import EncodingError, Ids
from deepseek_jax.data.sources import num_bytes, source_key
from deepseek_jax.data.split import check_filled, heldout_keys, is_heldout, read_source
from deepseek_jax.data.token_files import Documents, Writer, open_about, seal
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inputs import shown
from deepseek_jax.progress import Bar

LAYOUT = 2  # version of the folder's layout; part of the key
BATCH_CHARACTERS = 1_000_000  # that one process encodes at once, in less than a second
SMALL_CORPUS = 2_000_000  # bytes of files; a smaller corpus is encoded here before processes would have started
FEW_CORES = 2  # the tokenizer's own threads keep so many as busy as processes would

# From batches of texts to the ids of each batch, in the same order.
EncodeBatches = Callable[[Iterable[Sequence[str]]], Iterable[Ids]]

log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """All sources, tokenised."""

    train: tuple[Documents, ...]  # one per source
    heldout: tuple[Documents, ...]
    digest: str  # SHA-256 of the names and contents of all documents in order
    num_skipped: int  # items left out because data.on_error = "skip"
    skipped: tuple[str, ...]  # messages about the first few of them


def open_corpus(config: Config, tokenizer: Tokenizer, workdir: str | os.PathLike) -> Corpus:
    """Return the corpus of `config.data`; the first call tokenises it into `workdir`.

    Raises:
        ValueError: a source is missing, empty or unreadable, or has ids beyond the vocabulary.
    """
    folder = Path(workdir) / f"tokens-{_key(config, tokenizer)}"
    _remove_abandoned(folder.parent)
    about = _intact(folder)
    if about is None:
        _tokenize(config, tokenizer, folder)
        about = open_about(folder)
    if about["num_skipped"]:
        log.warning("%d items of the corpus were skipped, for example: %s", about["num_skipped"], about["skipped"][0])
    dtype = np.dtype(about["dtype"])
    splits = ("train", "heldout")
    train, heldout = (
        tuple(Documents(folder / f"{i}-{split}", dtype) for i in range(len(config.data.sources))) for split in splits
    )
    return Corpus(train, heldout, about["digest"], about["num_skipped"], tuple(about["skipped"]))


def _key(config: Config, tokenizer: Tokenizer) -> str:
    data = config.data
    keys = [source_key(source) for source in data.sources]
    parts = [LAYOUT, tokenizer.fingerprint, keys, data.text_field, data.on_error, data.heldout_fraction]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _intact(folder: Path) -> dict[str, Any] | None:
    """Return about.json of a cache, or None if there is none; a damaged one is removed."""
    if not folder.exists():
        return None
    try:
        return open_about(folder)
    except (ValueError, OSError) as error:
        log.warning("the token cache %s is damaged and is made again: %s", folder, error)
    trash = _partial(folder)
    with contextlib.suppress(FileNotFoundError):  # another process has removed it
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    return None


def _partial(folder: Path) -> Path:
    """Return a name beside `folder` that no other process uses, and that `_remove_abandoned` knows."""
    return folder.with_name(f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}")


def _tokenize(config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the cache folder under another name, and rename it when it is complete."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with this number: containers number anew
    partial.mkdir(parents=True)
    try:
        _write(config, tokenizer, partial)
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # if it does, another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    problems, digest = Problems(config.data.on_error), hashlib.sha256()
    total = sum(num_bytes(source) for source in config.data.sources)
    below = heldout_keys(config)
    bar = Bar(total, "tokenize")
    with bar, _encode_batches(tokenizer, total) as encode_batches:
        for i, source in enumerate(config.data.sources):
            documents = _checked(read_source(source, config.data, problems), tokenizer, source.path, problems)
            with Writer(folder / f"{i}-train", dtype) as train, Writer(folder / f"{i}-heldout", dtype) as heldout:
                for document, ids in _encode(documents, encode_batches, source.path, problems):
                    content_digest = document.digest()
                    name = os.fsencode(document.name)
                    digest.update(f"{len(name)} ".encode() + name + content_digest)
                    writer = heldout if is_heldout(content_digest, below[i]) else train
                    writer.add(ids, _num_bytes(document, ids, tokenizer))
                    bar.update(document.num_file_bytes)
            check_filled(len(train) + len(heldout), source, problems)
    about = {"digest": digest.hexdigest(), "dtype": dtype.name}
    seal(folder, about | {"num_skipped": problems.count, "skipped": problems.messages})


def _num_bytes(document: Document, ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of a document: of its text if it has one, else of its tokens."""
    text = document.content
    return len(text.encode()) if isinstance(text, str) else int(tokenizer.num_bytes_V[ids].sum())


@contextlib.contextmanager
def _encode_batches(tokenizer: Tokenizer, num_bytes: int) -> Iterator[EncodeBatches]:
    """Return an encoder of batches that keeps their order: a process per core, or this one if that is as fast."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_bytes < SMALL_CORPUS or num_cores <= FEW_CORES:
        yield functools.partial(map, tokenizer.encode_batch)
    else:
        with tokenizer.encoders(num_cores) as encoders:
            yield encoders.map


def _checked(
    documents: Iterable[Document], tokenizer: Tokenizer, origin: str, problems: Problems
) -> Iterator[Document]:
    """Yield the documents; those with ids that the tokenizer does not have are problems."""
    for document in documents:
        fault = id_fault(document.content, tokenizer.vocab_size) if isinstance(document.content, np.ndarray) else None
        if fault:
            problems.report(f"{shown(origin)}: {document.name} {fault}")
        else:
            yield document


def _encode(
    documents: Iterable[Document], encode_batches: EncodeBatches, origin: str, problems: Problems
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield every document with its ids; those that the tokenizer does not take are problems.

    `encode_batches` may read batches ahead.
    """
    read: deque[list[Document]] = deque()

    def texts() -> Iterator[list[str]]:
        for batch in _batches(documents):
            read.append(batch)
            yield [document.content for document in batch if isinstance(document.content, str)]

    for encoded in encode_batches(texts()):
        answers = iter(encoded)
        for document in read.popleft():
            ids = next(answers) if isinstance(document.content, str) else document.content
            if isinstance(ids, EncodingError):
                problems.report(f"{shown(origin)}: {document.name} cannot be tokenised: {ids}")
            else:
                yield document, ids if isinstance(ids, np.ndarray) else np.array(ids, np.int64)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield groups of whole documents, each of at least `BATCH_CHARACTERS` except the last."""
    batch, num_wanted = [], BATCH_CHARACTERS
    for document in documents:
        batch.append(document)
        num_wanted -= len(document.content)
        if num_wanted <= 0:
            yield batch
            batch, num_wanted = [], BATCH_CHARACTERS
    yield batch


def _remove_abandoned(workdir: Path) -> None:
    """Delete the unfinished caches of killed processes of this host."""
    for partial in workdir.glob(f"tokens-*.partial-{glob.escape(socket.gethostname())}-*"):
        try:
            os.kill(int(partial.name.rpartition("-")[2]), 0)  # signal 0 asks whether the process exists
        except (ProcessLookupError, ValueError, OverflowError):
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:
            continue  # it exists and belongs to another user
