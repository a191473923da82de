"""The training loader: shuffled, augmented, packed, sharded, prefetched; its position is two numbers.

    documents    of a source, shuffled anew each epoch, then FIM and splitting (Grain draws their random numbers
                 from a document's place in the sequence)
    windows      sources mixed by weight in tokens, cut into windows of a fixed number of documents
    rows         each window packed alone and its rows shuffled, by a thread that works ahead
    batches      the rows are one global sequence; each process takes its part of every batch

Best-fit packing wants many documents at once, and a packer that kept a buffer would have the buffer in its position.
Instead every window is a function of its index, so the position in the data is (window, row). It holds for any number
of processes and any batch size: a run continues on another mesh with the very rows it would have seen. Windows that had
been packed ahead are packed again. Epochs are per source; a window may hold the end of one and the start of the next.
Every process packs the whole sequence, so the speed of one process bounds that of all: `loader_throughput` measures it.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from deepseek_jax.config import Config, Data
from deepseek_jax.data.augmentation import Augmentation
from deepseek_jax.data.bpe import byte_tokenizer, check_vocab_size
from deepseek_jax.data.corpus_files import check_apart
from deepseek_jax.data.examples import Example, check_examples
from deepseek_jax.data.packing import Batch, Rows, next_token_batch, pack
from deepseek_jax.data.run_tokenizer import make_tokenizer
from deepseek_jax.data.sources import check_source
from deepseek_jax.data.split import train_texts
from deepseek_jax.data.token_cache import open_corpus
from deepseek_jax.data.token_files import Documents
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inputs import shown

# Tokens of a window, about. The rows of a window come from the same documents, so it must hold many more tokens than a
# short run sees: at 2**20, `tiny` met an eighth of its corpus, and its loss rose by 0.8 nats where the second window
# began. Packing a window takes a second or two.
WINDOW_TOKENS = 2**23
WINDOW_ROWS = 64  # at least, if rows are long
# Of one part, all epochs together. Grain gives an endless sequence the largest length that there is, and exceeds it
# where sequences of one example are mixed.
MOST_EXAMPLES = 2**50


class Loader:
    """An endless sequence of batches with an exact position."""

    def __init__(
        self,
        data: Data,
        windows: grain.IterDataset,
        made_from: dict[str, Any],
        process_index: int,
        process_count: int,
    ):
        """Use `make_train_loader` or `make_loader`."""
        self._data = data
        self._iterator = iter(windows)
        self._made_from = made_from
        self._process_index, self._process_count = process_index, process_count
        self._window_state = self._iterator.get_state()  # of the window that `_row` is in
        self._row = 0
        self._window: Rows | None = None

    def next_batch(self, batch_size: int) -> Batch:
        """Return this process's part of the next `batch_size` rows of the global sequence.

        Process p of P gets rows [p, p + 1) * batch_size / P, as `jax.make_array_from_process_local_data` expects.

        Returns:
            tokens_BS, targets_BS, positions_BS, segment_ids_BS (int32) and loss_weights_BS (float32); B is
            batch_size / P.

        Raises:
            ValueError: `batch_size` is not a multiple of the number of processes.
        """
        if batch_size <= 0 or batch_size % self._process_count:
            raise ValueError(
                f"a batch of {batch_size} sequences does not divide over {self._process_count} processes; use a"
                " positive multiple of their number"
            )
        share = batch_size // self._process_count
        before = self._process_index * share
        self._advance(before)
        views = self._advance(share)
        self._advance(batch_size - before - share)
        return next_token_batch(Rows(*map(np.concatenate, zip(*views, strict=True))), self._data)

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch: values of JSON, equal on every process."""
        return {"windows": self._window_state, "row": self._row, "made_from": dict(self._made_from)}

    def restore(self, position: dict[str, Any]) -> None:
        """Go to a position that `state` returned, whatever the number of processes was and is.

        Raises:
            ValueError: the position belongs to other data or settings.
        """
        theirs = position["made_from"]
        differences = [
            f"{key} was {theirs.get(key)!r}, is {value!r}"
            for key, value in self._made_from.items()
            if theirs.get(key) != value
        ]
        if differences:
            raise ValueError(
                f"the data position belongs to another data stream ({'; '.join(differences)}); restore these or start"
                " a new workdir"
            )
        self._iterator.set_state(position["windows"])
        self._window_state, self._row, self._window = position["windows"], position["row"], None

    def close(self) -> None:
        """Stop the packing thread."""
        self._iterator.close()

    def _advance(self, count: int) -> list[Rows]:
        """Move past `count` rows and return them, as views of their windows."""
        views = []
        while count:
            if self._window is None:
                self._window = next(self._iterator)
            num_rows = len(self._window.tokens)
            end = min(self._row + count, num_rows)
            views.append(Rows(*(array[self._row : end] for array in self._window)))
            count -= end - self._row
            self._row = end
            if end == num_rows:
                self._window_state, self._row, self._window = self._iterator.get_state(), 0, None
        return views


def check_data(config: Config, workdir: str | os.PathLike | None) -> None:
    """Refuse sources and a tokenizer that are not there, before anything is computed or written.

    Args:
        config: of the run.
        workdir: its folder; None if that will be a new one, away from every source.

    Raises:
        ValueError: a source cannot be read (`sources.check_source`) or would read the run's own files
            (`corpus_files.check_apart`), or the file `data.tokenizer`, which a workdir without a tokenizer needs,
            cannot be, or has more ids than the model.
    """
    for source in config.data.sources:
        check_source(source)
        if workdir is not None:
            check_apart(source, Path(workdir))
    has_tokenizer = workdir is not None and os.path.lexists(Path(workdir) / "tokenizer.json")
    if has_tokenizer:
        return
    if config.data.tokenizer == "bpe":
        if not config.training.initial_weights:  # whose tokenizer is taken
            check_vocab_size(config.model.vocab_size)
        return
    tokenizer = byte_tokenizer() if config.data.tokenizer == "byte" else Tokenizer.load(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"config.data.tokenizer = {shown(config.data.tokenizer)} needs {tokenizer.vocab_size} ids and"
            f" config.model.vocab_size = {config.model.vocab_size}; set that to at least {tokenizer.vocab_size}"
        )


def open_tokenizer(config: Config, workdir: str | os.PathLike) -> Tokenizer:
    """Return the run's tokenizer: the one cached in `workdir`, or a new one; a BPE is trained on the train split."""
    return make_tokenizer(config, workdir, train_texts(config))


def make_train_loader(
    config: Config, tokenizer: Tokenizer, workdir: str | os.PathLike, process_index: int = 0, process_count: int = 1
) -> Loader:
    """Return the loader of the train split at its start; the first call tokenises the corpus into `workdir`.

    Raises:
        ValueError: bad input (see `sources`, `token_cache`), a source without training documents, or a tokenizer
            without the tokens that FIM needs.
    """
    data, corpus = config.data, open_corpus(config, tokenizer, workdir)
    augment = Augmentation(tokenizer, data.fim_rate, data.split_rate)
    parts = []
    for source, documents in zip(data.sources, corpus.train, strict=True):
        if not len(documents):
            raise ValueError(
                f"data source {source.path!r} has no document in the train split; add documents or lower"
                " data.heldout_fraction"
            )
        parts.append(_Part(documents, _mean_length(documents), source.weight, augment))
    made_from = {"corpus": corpus.digest, "tokenizer": tokenizer.fingerprint, "seed": config.seed}
    made_from |= {"weights": [source.weight for source in data.sources], "heldout_fraction": data.heldout_fraction}
    made_from |= {name: getattr(data, name) for name in ("sequence_length", "fim_rate", "split_rate")}
    return _loader(config, tokenizer.pad, parts, made_from, process_index, process_count)


def make_loader(
    config: Config, tokenizer: Tokenizer, examples: Sequence[Example], process_index: int = 0, process_count: int = 1
) -> Loader:
    """Return the loader of `examples`, a sequence that need not be in memory, at its start.

    Examples are trained on as they are: `data.sources`, `fim_rate` and `split_rate` say nothing about them. They are
    read once here, to be checked and to tell their positions from those of others, and then once per epoch.

    Raises:
        ValueError: there are none, or as `check_examples`.
    """
    if not len(examples):
        raise ValueError("there are no examples to train on; give at least one")
    num_tokens, digest = check_examples(examples, tokenizer.vocab_size)
    made_from = {"examples": digest, "seed": config.seed, "sequence_length": config.data.sequence_length}
    parts = [_Part(examples, num_tokens / len(examples))]
    return _loader(config, tokenizer.pad, parts, made_from, process_index, process_count)


def loader_throughput(config: Config, tokenizer: Tokenizer, workdir: str | os.PathLike, batch_size: int) -> float:
    """Return the tokens per second of one process's loader on its own, packing included, over four windows."""
    loader = make_train_loader(config, tokenizer, workdir)
    num_tokens, start = 0, time.perf_counter()
    while num_tokens < 4 * WINDOW_TOKENS:
        num_tokens += loader.next_batch(batch_size)["tokens_BS"].size
    seconds = time.perf_counter() - start
    loader.close()
    return num_tokens / seconds


class _Part(NamedTuple):
    """One part of what a loader mixes."""

    documents: Sequence  # of ids, with `augment`; of examples, without
    mean_length: float  # in tokens, BOS and EOS included
    weight: float = 1.0  # in tokens, relative to the other parts
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None


def _loader(
    config: Config, pad: int, parts: list[_Part], made_from: dict[str, Any], process_index: int, process_count: int
) -> Loader:
    data = config.data
    options = grain.ReadOptions(num_threads=min(1, data.prefetch), prefetch_buffer_size=data.prefetch)
    windows = _windows(parts, data.sequence_length + 1, pad, config.seed).to_iter_dataset(options)
    return Loader(data, windows, made_from, process_index, process_count)


def _windows(parts: list[_Part], row_length: int, pad: int, seed: int) -> grain.MapDataset:
    """Return the endless sequence of packed windows: index -> Rows."""
    seeds = np.random.SeedSequence(seed).generate_state(len(parts) + 1)
    streams = [_stream(part, int(part_seed)) for part, part_seed in zip(parts, seeds, strict=False)]
    densities = [part.weight / part.mean_length for part in parts]  # weights count tokens, mixing counts documents
    window_tokens = max(WINDOW_TOKENS, WINDOW_ROWS * row_length)
    mean_length = sum(part.weight for part in parts) / sum(densities)
    window_size = min(max(1, round(window_tokens / mean_length)), sum(len(part.documents) for part in parts))

    def pack_window(examples: list[Example], rng: np.random.Generator) -> Rows:
        rows = pack(examples, row_length, pad)
        order = rng.permutation(len(rows.tokens))
        return Rows(*(array[order] for array in rows))

    mixed = grain.MapDataset.mix(streams, densities)
    return mixed.batch(window_size, batch_fn=list).seed(int(seeds[-1])).random_map(pack_window)


def _stream(part: _Part, seed: int) -> grain.MapDataset:
    """Return a part's examples, shuffled anew each epoch, for more epochs than any run has."""
    epochs = -(-MOST_EXAMPLES // len(part.documents))
    documents = grain.MapDataset.source(part.documents).seed(seed).shuffle().repeat(epochs)
    return documents.random_map(part.augment).map(Example) if part.augment else documents


def _mean_length(documents: Documents) -> float:
    return documents.num_tokens / len(documents) + 2  # BOS and EOS
