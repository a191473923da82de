"""The batches of a benchmark: of a corpus, or random tokens, as each process of a mesh reads them."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.packing import Batch, Rows, next_token_batch
from deepseek_jax.data.pipeline import make_train_loader, open_tokenizer
from deepseek_jax.parallel.context import readers

NUM_RANDOM_BATCHES = 4


def batches_on(mesh: jax.sharding.Mesh, workdir: Path | None, config: Config, size: int) -> Iterator[Batch]:
    """Yield what this process reads of batches of `size` sequences: of the corpus, or of random tokens if None."""
    if workdir is None:
        return random_batches(config, size, *readers(mesh))
    return corpus_batches(config, workdir, size, *readers(mesh))


def random_batches(config: Config, size: int, index: int = 0, count: int = 1) -> Iterator[Batch]:
    """Yield reader `index`'s rows of a few batches of uniformly random tokens, over and over, the same on any mesh."""
    rng = np.random.default_rng(config.seed)
    shape = size, config.data.sequence_length + 1
    whole = [rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(NUM_RANDOM_BATCHES)]
    share = size // count
    rows = [tokens[index * share : (index + 1) * share] for tokens in whole]
    ones = np.ones_like(rows[0])
    batches = [next_token_batch(Rows(tokens, segments=ones, weights=ones), config.data) for tokens in rows]
    while True:
        yield from batches


def corpus_batches(config: Config, workdir: Path, size: int, index: int = 0, count: int = 1) -> Iterator[Batch]:
    """Yield reader `index`'s rows of the batches that training would see first."""
    loader = make_train_loader(config, open_tokenizer(config, workdir), workdir, index, count)
    while True:
        yield loader.next_batch(size)
