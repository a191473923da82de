"""The held-out split as batches in which every byte counts exactly once.

Documents of a source have one fixed order and form one sequence of (input, target) pairs: BOS t1 .. tn EOS gives
(BOS, t1), (t1, t2), ..., (tn, EOS). EOS is never an input and BOS never a target, so the targets are the whole text and
the ends of documents. The sequence is cut into rows of S pairs. A row may start inside a document; the model then does
not see the earlier part. All rows are full except the last, which is padded with weight 0.

    bits per byte = (sum of the nats of all targets) / ln 2 / num_bytes

EOS costs nats and has no bytes: a compressor would have to say where a document ends, too.

Each source is measured alone, and the figure of several is the mean by the weights of the sources. Pooled documents
would count a source by its size: a mixture of 0.5, 0.3 and 0.2 had 5,342, 22,643 and 93 documents held out.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deepseek_jax.config import Config, Data
from deepseek_jax.data.packing import Batch, assemble
from deepseek_jax.data.token_cache import open_corpus
from deepseek_jax.data.token_files import Documents
from deepseek_jax.data.tokenizer import Tokenizer


class HeldOutPart:
    """The held-out text of one source: a finite, repeatable sequence of batches, and the text that they cover.

    `num_rows`, `num_tokens` (targets with weight) and `num_bytes` (their UTF-8 bytes) count the parts of all processes.
    `weight` is that of the source.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: Tokenizer,
        documents: Documents,
        weight: float,
        batch_size: int,
        num_batches: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Use `heldout_batches`."""
        self.weight = weight
        self._data, self._tokenizer, self._documents = data, tokenizer, documents
        self._batch_size, self._process_index, self._process_count = batch_size, process_index, process_count
        # a random order, so that the first few batches are a fair sample
        self._order = np.random.default_rng(0).permutation(len(documents))
        num_pairs = np.diff(documents.ends, prepend=0)[self._order] + 1
        self._starts = np.concatenate([[0], np.cumsum(num_pairs)])  # of each document in the sequence of pairs
        total = int(self._starts[-1])
        self.num_tokens = total if num_batches is None else min(total, num_batches * batch_size * data.sequence_length)
        self.num_rows = -(-self.num_tokens // data.sequence_length)
        self.num_bytes = self._count_bytes(documents.num_bytes[self._order])

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.num_rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's part of each batch, as `Loader.next_batch` does."""
        share = self._batch_size // self._process_count
        for start in range(0, self.num_rows, self._batch_size):
            first = start + self._process_index * share
            yield self._rows(first, first + share)

    def texts(self) -> Iterator[bytes]:
        """Yield the text of each document that the batches reach; the last may be cut.

        Their total length is `num_bytes`, exactly so for byte-level tokenizers.
        """
        for i in range(int(np.searchsorted(self._starts, self.num_tokens))):
            _, targets = self._pairs(i)
            yield self._tokenizer.decode_bytes(targets[: self.num_tokens - int(self._starts[i])])

    def _count_bytes(self, num_bytes: np.ndarray) -> int:
        """Return the bytes of the targets; `num_bytes` has those of whole documents, and the last may be cut."""
        whole = int(np.searchsorted(self._starts, self.num_tokens, side="right")) - 1
        rest = self.num_tokens - int(self._starts[whole])
        cut = int(self._tokenizer.num_bytes_V[self._pairs(whole)[1][:rest]].sum()) if rest else 0
        return int(num_bytes[:whole].sum()) + cut

    def _pairs(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of document i."""
        ids = self._documents[int(self._order[i])]
        return np.append(np.int32(self._tokenizer.bos), ids), np.append(ids, np.int32(self._tokenizer.eos))

    def _rows(self, first: int, last: int) -> Batch:
        """Return rows first .. last - 1; rows beyond the end are padding."""
        length = self._data.sequence_length
        begin, end = first * length, min(last * length, self.num_tokens)
        inputs, targets = (np.full((last - first) * length, self._tokenizer.pad, np.int32) for _ in range(2))
        documents = np.zeros((last - first) * length, np.int64)  # 1 + index of the document; 0 for padding
        i = int(np.searchsorted(self._starts, begin, side="right")) - 1
        position = begin
        while position < end:
            stop, start = min(end, int(self._starts[i + 1])), int(self._starts[i])
            here, inside = slice(position - begin, stop - begin), slice(position - start, stop - start)
            inputs[here], targets[here] = (pair[inside] for pair in self._pairs(i))
            documents[here] = i + 1
            position, i = stop, i + 1
        inputs_BS, targets_BS, documents_BS = (array.reshape(-1, length) for array in (inputs, targets, documents))
        segments_BS = np.where(documents_BS > 0, documents_BS - documents_BS[:, :1] + 1, 0).astype(np.int32)
        return assemble(inputs_BS, targets_BS, segments_BS, documents_BS > 0, self._data)


class HeldOut:
    """The held-out text of all sources, one part for each; a source of which nothing is held out has an empty part."""

    def __init__(self, parts: Sequence[HeldOutPart]):
        """Use `heldout_batches`."""
        self.parts = tuple(parts)

    @property
    def num_tokens(self) -> int:
        """The targets of all parts."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """The UTF-8 bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's share of each batch of one part after the other."""
        return itertools.chain.from_iterable(self.parts)

    def texts(self) -> Iterator[bytes]:
        """Yield the text of each document that the batches reach."""
        return itertools.chain.from_iterable(part.texts() for part in self.parts)

    def mean(self, values: Sequence[Any]) -> Any:
        """Return the mean of one value per part, by the weights of the sources of which something is held out.

        Values are numbers or arrays; those of empty parts are not read. One part's value is returned as it is.
        """
        pairs = [(part.weight, value) for part, value in zip(self.parts, values, strict=True) if part.num_rows]
        if len(pairs) == 1:
            return pairs[0][1]
        return sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)


def heldout_batches(
    config: Config,
    tokenizer: Tokenizer,
    workdir: str | os.PathLike,
    batch_size: int,
    num_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOut:
    """Return the held-out split in batches, or about the first `num_batches` of them, shared out by weight.

    Args:
        batch_size: rows of a batch, over all processes together.
        num_batches: each source has at least one of them.

    Raises:
        ValueError: the split is empty, or `batch_size` does not divide over the processes.
    """
    corpus = open_corpus(config, tokenizer, workdir)
    if not sum(map(len, corpus.heldout)):
        total = sum(map(len, corpus.train))
        raise ValueError(
            f"none of {total} documents is held out at data.heldout_fraction = {config.data.heldout_fraction}; raise it"
        )
    if batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} sequences does not divide over {process_count} processes; use a multiple"
        )
    weights = [source.weight for source in config.data.sources]
    total_weight = sum(weight for weight, documents in zip(weights, corpus.heldout, strict=True) if len(documents))
    parts = []
    for documents, weight in zip(corpus.heldout, weights, strict=True):
        share = None if num_batches is None else max(1, round(num_batches * weight / total_weight))
        parts.append(
            HeldOutPart(config.data, tokenizer, documents, weight, batch_size, share, process_index, process_count)
        )
    return HeldOut(parts)


def open_held_out(
    config: Config,
    tokenizer: Tokenizer,
    workdir: str | os.PathLike,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOut:
    """Return the batches that a run is evaluated on: `training.eval_batches` of `training.micro_batch_size` rows.

    Raises:
        ValueError: as `heldout_batches`.
    """
    training = config.training
    sizes = training.micro_batch_size, training.eval_batches
    return heldout_batches(config, tokenizer, workdir, *sizes, process_index, process_count)
