"""Which documents are trained on, and which are held out.

The content of a document alone decides: it is held out if the first 8 bytes of its SHA-256, as a number, are below
`heldout_fraction` * 2**64. So a new file moves no other document, and two copies of a text share a split.

A hash splits well what is many and small. So no document may be longer than `longest_document`; a longer one is cut as
a large text file is. Its three bounds:

    2**20 bytes                    what the tokenizer can take at once, whoever made the document
    the share to be held out       of the bytes of the source's files, rounded up to a power of two, so that it seldom
                                   changes when files are added: two books of 85 KB become 42 documents
    8,192 bytes, at least          shorter documents teach little and are never cut

What is left is a small corpus in which the hash chooses none or all. Then the documents with the smallest hashes are
held out until they have the share's bytes, or the one with the largest is trained on. Only there, and where the second
bound changes, can a new file move another document; never in "stdlib", whose documents are whole files. Two sources
may cut two copies of a text differently if one of them is small.
"""

import io
import math
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from deepseek_jax.config import Config, Data, Source
from deepseek_jax.data.corpus_files import STDLIB
from deepseek_jax.data.documents import Document, Problems
from deepseek_jax.data.sources import check_source, num_bytes, read_documents
from deepseek_jax.data.text_files import SHORTEST_BLOCK, block_size, cut_text
from deepseek_jax.inputs import shown

LONGEST_DOCUMENT = 2**20  # bytes
ALWAYS_WHOLE = 2 * SHORTEST_BLOCK  # bytes
BLOCKS_OF_LONGEST = 8  # a document that is too long is cut into at least so many
# BPE is trained on so much text: merges change little with more, and a large corpus is not read twice.
TOKENIZER_CHARACTERS = 200_000_000


def read_source(source: Source, data: Data, problems: Problems) -> Iterator[Document]:
    """Yield the documents of one of `data.sources` as they are trained on and held out, in their fixed order.

    Raises:
        ValueError: as `sources.read_documents`.
    """
    longest = longest_document(source, data.heldout_fraction)
    return _cut(read_documents(source, data.text_field, problems), longest)


def longest_document(source: Source, fraction: float) -> int:
    """Return how many bytes a document of `source` may have."""
    share = min(fraction, 1.0 - fraction) * num_bytes(source)
    if source.path == STDLIB or not share:
        return LONGEST_DOCUMENT
    return min(max(ALWAYS_WHOLE, 2 ** math.ceil(math.log2(share))), LONGEST_DOCUMENT)


def heldout_keys(config: Config) -> list[int]:
    """Return for each source the number below which the keys of its held-out documents are (`is_heldout`).

    It reads a source until one document of each split is found: about 50 documents at 2%.

    Raises:
        ValueError: a source has no document; `data.heldout_fraction` is between 0 and 1, and no source has two
            different documents; or as `sources.read_documents`.
    """
    data = config.data
    for source in data.sources:
        check_source(source)
    below, sizes = zip(*(_heldout_key(source, data) for source in data.sources), strict=True)
    if 0.0 < data.heldout_fraction < 1.0 and not any(below):
        held = ", ".join(f"{source.path!r} {size:,} bytes" for source, size in zip(data.sources, sizes, strict=True))
        raise ValueError(
            f"there is too little text to train on one part and hold out another: {held}, in one document (or copies"
            f" of it); add other documents, or more text: beyond {ALWAYS_WHOLE:,} bytes a document is cut"
        )
    return list(below)


def is_heldout(digest: bytes, below: int) -> bool:
    """Return whether a document with this SHA-256 is held out: whether its key is less than `below`."""
    return _key(digest) < below


def train_texts(config: Config) -> Iterator[str]:
    """Yield texts of the train split to train a tokenizer on, from each source in proportion to its weight.

    Raises:
        ValueError: there are no texts, for example because all sources hold token ids; or as `heldout_keys`.
    """
    data = config.data
    total = sum(source.weight for source in data.sources)
    empty = True
    for source, below in zip(data.sources, heldout_keys(config), strict=True):
        num_wanted = TOKENIZER_CHARACTERS * source.weight / total
        for document in read_source(source, data, Problems(data.on_error)):
            if isinstance(document.content, np.ndarray) or is_heldout(document.digest(), below):
                continue
            if num_wanted <= 0:
                break
            num_wanted -= len(document.content)
            empty = False
            yield document.content
    if empty and data.heldout_fraction == 1.0:
        raise ValueError("data.heldout_fraction = 1 leaves nothing to train on; lower it, 0.02 for example")
    if empty:
        raise ValueError(
            "no training text in data.sources to train a tokenizer on; set data.tokenizer to a tokenizer.json or 'byte'"
        )


def check_filled(num_documents: int, source: Source, problems: Problems) -> None:
    """Refuse a source of which no document could be read, with the reason for the first."""
    if not num_documents:
        first = f"; the first: {problems.messages[0]}" if problems.count else ""
        remedy = "repair them, or name another source" if problems.count else "add text to it"
        raise ValueError(
            f"data source {shown(source.path)!r} holds no readable document ({problems.count} items skipped{first});"
            f" {remedy}"
        )


def _cut(documents: Iterable[Document], longest: int) -> Iterator[Document]:
    for document in documents:
        content = document.content
        # a character has at most 4 bytes, and an id has 4
        if 4 * len(content) <= longest or _num_bytes(document) <= longest:
            yield document
            continue
        size = max(block_size(_num_bytes(document)), longest // BLOCKS_OF_LONGEST)
        if isinstance(content, str):
            parts = ((block.place, block.content.decode()) for block in cut_text(io.BytesIO(content.encode()), size))
        else:
            parts = ((i, content[i : i + size // 4]) for i in range(0, len(content), size // 4))
        for place, part in parts:
            share = document.num_file_bytes * len(part) // len(content)
            yield Document(f"{document.name}:{place}", part, share)


def _heldout_key(source: Source, data: Data) -> tuple[int, int]:
    """Return what `heldout_keys` does for one source, and how many bytes were read to know it."""
    fraction = data.heldout_fraction
    below = math.ceil(fraction * 2**64)
    keys, sizes, found = array("Q"), array("Q"), set()
    problems = Problems(data.on_error)
    for document in read_source(source, data, problems):
        keys.append(_key(document.digest()))
        sizes.append(_num_bytes(document))
        found.add(keys[-1] < below)
        if len(found) == 2:
            return below, sum(sizes)
    check_filled(len(keys), source, problems)
    different = sorted(set(keys))
    if fraction in (0.0, 1.0):
        return below, sum(sizes)
    if len(different) == 1:
        return 0, sum(sizes)
    if different[-1] < below:
        return different[-1], sum(sizes)
    pairs = sorted(zip(keys, sizes, strict=True))
    wanted = np.searchsorted(np.cumsum([size for _, size in pairs]), fraction * sum(sizes))
    return min(pairs[wanted][0] + 1, different[-1]), sum(sizes)


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _num_bytes(document: Document) -> int:
    content = document.content
    return len(content.encode()) if isinstance(content, str) else content.astype("<i4").nbytes
