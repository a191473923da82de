"""Yardsticks beside held-out bits per byte, on the same bytes.

They answer "compared with what?" without another model, and average the sources by weight as the model's figure does:

    bigram of the tokens seen                  knows the previous token, and has seen exactly the tokens of the run
    gzip -9 of pieces of the model's context   knows at most what the model knows: nothing beyond the context
    gzip -9, xz -9 of each document            know each whole document

The bigram is interpolated by Witten and Bell's rule (1991), which has no free parameter: a context that was followed by
T different tokens in n occurrences gives T / (n + T) of its probability to the shorter context; below the shortest, all
V ids are equally likely:

    p(b | a) = (n(a, b) + T(a) p(b)) / (n(a) + T(a))          p(b) = (n(b) + T / V) / (n + T)

Its counts are in no checkpoint. The data stream is a function of the configuration, so the stream is read again from
its start to count the tokens that a run has seen. That is exact whatever interruptions there were, needs no state, and
is possible later from the workdir alone. The loader is many times as fast as a step, so this costs a few percent of the
run. Beyond `MOST_COUNTED_TOKENS` the bigram is left out with a warning, because the table of pairs outgrows the host.
"""

import functools
import gzip
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from deepseek_jax.config import Config
from deepseek_jax.data.heldout import HeldOutPart, open_held_out
from deepseek_jax.data.pipeline import Loader, make_train_loader
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.training.metrics import MetricsLog, read_rows
from deepseek_jax.training.workdir import occupied

MOST_COUNTED_TOKENS = 2 * 10**9
ROWS_AT_ONCE = 1024  # rows of the stream per read, while counting


class Bigram(NamedTuple):
    """Counts of pairs of tokens, as sorted distinct keys `first * V + second`."""

    keys: np.ndarray  # int64
    counts: np.ndarray  # int64
    vocab_size: int


def add_yardsticks(
    config: Config, workdir: Path, tokenizer: Tokenizer, step: int, tokens_seen: int, wandb: str = ""
) -> dict[str, float | None]:
    """Return the yardsticks of a run after `step`; measure and write them if its metrics lack them.

    `wandb` is a project of Weights & Biases to write them to as well.

    Raises:
        ValueError: another process trains in `workdir` by now.
    """
    for row in read_rows(workdir):
        if row["step"] == step and "yardstick/bigram_bits_per_byte" in row:
            return row
    yardsticks = measure_yardsticks(config, workdir, tokenizer, tokens_seen)
    with occupied(workdir):
        if all(row["step"] <= step for row in read_rows(workdir)):  # else the run has gone on meanwhile
            log = MetricsLog(workdir, step, config, wandb)
            log.write({"step": step, "tokens_seen": tokens_seen} | yardsticks)
            log.close()
    return yardsticks


def measure_yardsticks(
    config: Config, workdir: Path, tokenizer: Tokenizer, tokens_seen: int
) -> dict[str, float | None]:
    """Return bits per byte of every yardstick on the held-out text, by their keys in the metrics.

    The bigram is None if there are too many tokens to count.
    """
    held_out = open_held_out(config, tokenizer, workdir)  # every process measures all of it
    gzip9 = functools.partial(gzip.compress, compresslevel=9, mtime=0)
    xz9 = functools.partial(lzma.compress, preset=9)
    measured = {
        "yardstick/bigram_bits_per_byte": None,
        "yardstick/gzip_pieces_bits_per_byte": held_out.mean(
            [bits_per_byte(gzip9, excerpts(part, tokenizer)) for part in held_out.parts]
        ),
        "yardstick/gzip_files_bits_per_byte": held_out.mean(
            [bits_per_byte(gzip9, part.texts()) for part in held_out.parts]
        ),
        "yardstick/xz_files_bits_per_byte": held_out.mean(
            [bits_per_byte(xz9, part.texts()) for part in held_out.parts]
        ),
    }
    if tokens_seen > MOST_COUNTED_TOKENS:
        logging.warning(
            "the bigram yardstick is left out: %d tokens seen, at most %d are counted", tokens_seen, MOST_COUNTED_TOKENS
        )
        return measured
    loader = make_train_loader(config, tokenizer, workdir)
    bigram = count_bigrams(loader, tokens_seen // config.data.sequence_length, config.model.vocab_size)
    loader.close()
    bits = [
        bigram_nats(bigram, part) / np.log(2.0) / part.num_bytes if part.num_bytes else None for part in held_out.parts
    ]
    return measured | {"yardstick/bigram_bits_per_byte": held_out.mean(bits)}


def bits_per_byte(compress, texts: Iterable[bytes]) -> float | None:
    """Compress each text alone; return the bits of all results over the bytes of all texts, None if there are none."""
    sizes = np.array([(0, 0)] + [(len(compress(text)), len(text)) for text in texts if text], np.int64).sum(axis=0)
    return float(8.0 * sizes[0] / sizes[1]) if sizes[1] else None


def excerpts(held_out: HeldOutPart, tokenizer: Tokenizer) -> Iterable[bytes]:
    """Yield the text that each row of the held-out batches predicts: as much as fits the model's context."""
    for batch in held_out:
        for targets_S, weights_S in zip(batch["targets_BS"], batch["loss_weights_BS"], strict=True):
            yield tokenizer.decode_bytes(targets_S[weights_S > 0])


def count_bigrams(loader: Loader, num_rows: int, vocab_size: int) -> Bigram:
    """Count the (input, target) pairs with weight in the next `num_rows` rows of `loader`."""
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, num_rows, ROWS_AT_ONCE):
        batch = loader.next_batch(min(ROWS_AT_ONCE, num_rows - start))
        new = _pair_keys(batch, vocab_size)
        keys, inverse = np.unique(np.concatenate([keys, new]), return_inverse=True)
        ones = np.ones(len(new), np.int64)
        counts = np.bincount(inverse, np.concatenate([counts, ones]), minlength=len(keys)).astype(np.int64)
    return Bigram(keys, counts, vocab_size)


def bigram_nats(bigram: Bigram, held_out: Iterable[dict[str, np.ndarray]]) -> float:
    """Return the cross entropy of the interpolated bigram, summed over all targets with weight, in nats."""
    size, keys = bigram.vocab_size, bigram.keys
    first, second = np.divmod(keys, size)
    n_a = np.bincount(first, bigram.counts, minlength=size)  # occurrences of a context
    types_a = np.bincount(first, minlength=size)  # different tokens that followed it
    n_b = np.bincount(second, bigram.counts, minlength=size)
    types = np.count_nonzero(n_b)
    p_b = (n_b + types / size) / (n_b.sum() + types) if len(keys) else np.full(size, 1.0 / size)

    nats = 0.0
    for batch in held_out:
        wanted = _pair_keys(batch, size)
        a, b = np.divmod(wanted, size)
        n_ab = np.zeros(len(wanted))
        if len(keys):
            index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            n_ab = np.where(keys[index] == wanted, bigram.counts[index], 0)
        seen = n_a[a] > 0
        backed_off = (n_ab + types_a[a] * p_b[b]) / np.where(seen, n_a[a] + types_a[a], 1.0)
        nats -= float(np.log(np.where(seen, backed_off, p_b[b])).sum())
    return nats


def _pair_keys(batch: dict[str, np.ndarray], vocab_size: int) -> np.ndarray:
    keep_BS = batch["loss_weights_BS"] > 0
    return batch["tokens_BS"][keep_BS].astype(np.int64) * vocab_size + batch["targets_BS"][keep_BS]
