"""The held-out split as batches in which every byte counts exactly once.

Documents are put in one fixed order and joined into one sequence of (input, target) pairs: for BOS t1 .. tn EOS these are (BOS, t1),
(t1, t2), ..., (tn, EOS). EOS is never an input and BOS never a target, so all text is predicted, from the first byte of each document on, and
nothing else. The sequence is cut into rows of S pairs; a row may start inside a document, whose earlier part is then out of sight. Rows
are full but for the last, which is padded with weight 0.

    bits per byte = (sum of the nats of all targets) / ln 2 / num_bytes

EOS costs nats and has no bytes: where a document ends is part of what a compressor would have to say.
"""

import os
from collections.abc import Iterator

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.packing import Batch, assemble
from deepseek_jax.data.token_cache import Documents, open_corpus
from deepseek_jax.data.tokenizer import Tokenizer


class HeldOut:
    """A finite, repeatable sequence of batches, and the text that they cover.

    `num_rows`, `num_tokens` (targets with weight) and `num_bytes` (their UTF-8 bytes) count all processes' parts together.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, documents: tuple[Documents, ...], batch_size: int, num_batches: int | None):
        """Use `heldout_batches`."""
        self._data, self._tokenizer, self._documents = config.data, tokenizer, documents
        self.batch_size, self.process_index, self.process_count = batch_size, 0, 1
        addresses = [(source, i) for source, of_source in enumerate(documents) for i in range(len(of_source))]
        order = np.random.default_rng(0).permutation(len(addresses))  # so that the first few batches are a fair sample
        self._addresses = [addresses[i] for i in order]
        lengths = [self._length(*address) for address in self._addresses]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # of each document in the sequence of pairs
        limit = int(self._starts[-1]) if num_batches is None else num_batches * batch_size * config.data.sequence_length
        self.num_tokens = min(int(self._starts[-1]), limit)
        self.num_rows = -(-self.num_tokens // config.data.sequence_length)
        self.num_bytes = sum(self._num_bytes(i) for i in range(self._num_documents()))

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's part of each batch, as `Loader.next_batch` does."""
        share = self.batch_size // self.process_count
        for start in range(0, self.num_rows, self.batch_size):
            first = start + self.process_index * share
            yield self._batch(first, first + share)

    def texts(self) -> Iterator[bytes]:
        """Yield the text of each document; of the last one, as far as the batches reach. `num_bytes` is their total length."""
        for i in range(self._num_documents()):
            _, targets = self._pairs(i)
            yield self._tokenizer.decode_bytes(targets[: self.num_tokens - int(self._starts[i])])

    def _length(self, source: int, index: int) -> int:
        ends = self._documents[source].ends
        return int(ends[index] - (ends[index - 1] if index else 0)) + 1

    def _num_documents(self) -> int:
        return int(np.searchsorted(self._starts, self.num_tokens))

    def _pairs(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        source, index = self._addresses[i]
        ids = self._documents[source][index]
        return np.append(np.int32(self._tokenizer.bos), ids), np.append(ids, np.int32(self._tokenizer.eos))

    def _num_bytes(self, i: int) -> int:
        """Bytes of the targets of document `i` that are in the batches; exact for a whole document whatever the tokenizer."""
        source, index = self._addresses[i]
        if self._starts[i + 1] <= self.num_tokens:
            return int(self._documents[source].num_bytes[index])
        _, targets = self._pairs(i)
        return int(self._tokenizer.num_bytes_V[targets[: self.num_tokens - int(self._starts[i])]].sum())

    def _batch(self, first_row: int, end_row: int) -> Batch:
        length = self._data.sequence_length
        size = (end_row - first_row) * length
        tokens, targets = (np.full(size, self._tokenizer.pad, np.int32) for _ in range(2))
        documents = np.zeros(size, np.int64)  # 1 + index of the document; 0 for padding
        start, end = first_row * length, min(end_row * length, self.num_tokens)
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < end:
            inputs_here, targets_here = self._pairs(i)
            stop = min(end, int(self._starts[i + 1]))
            inside, here = (
                slice(start - int(self._starts[i]), stop - int(self._starts[i])),
                slice(start - first_row * length, stop - first_row * length),
            )
            tokens[here], targets[here], documents[here] = inputs_here[inside], targets_here[inside], i + 1
            start, i = stop, i + 1
        documents_BS = documents.reshape(-1, length)
        segments_BS = np.where(documents_BS > 0, documents_BS - documents_BS[:, :1] + 1, 0)
        return assemble(tokens.reshape(-1, length), targets.reshape(-1, length), segments_BS.astype(np.int32), documents_BS > 0, self._data)


def heldout_batches(
    config: Config,
    tokenizer: Tokenizer,
    workdir: str | os.PathLike,
    batch_size: int,
    num_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOut:
    """Return the held-out split in batches of `batch_size` rows over all processes; the first `num_batches` of them if given.

    Raises:
        ValueError: the split is empty, or `batch_size` does not divide over the processes.
    """
    corpus = open_corpus(config, tokenizer, workdir)
    if not sum(len(documents) for documents in corpus.heldout):
        total = sum(len(documents) for documents in corpus.train)
        raise ValueError(f"none of {total} documents is held out at data.heldout_fraction = {config.data.heldout_fraction}; raise it")
    if batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} sequences does not divide over {process_count} processes; use a multiple")
    held_out = HeldOut(config, tokenizer, corpus.heldout, batch_size, num_batches)
    held_out.process_index, held_out.process_count = process_index, process_count
    return held_out
