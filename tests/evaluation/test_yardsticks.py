"""Yardsticks against slow, obvious versions of themselves, and the evaluation of a workdir."""

import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging

from deepseek_jax.config import Source, from_config_dict
from deepseek_jax.data.heldout import open_held_out
from deepseek_jax.data.pipeline import make_train_loader, open_tokenizer
from deepseek_jax.data.token_cache import open_corpus
from deepseek_jax.evaluation import yardsticks
from deepseek_jax.evaluation.workdir import check_corpus, evaluate_workdir
from deepseek_jax.evaluation.yardsticks import (
    Bigram,
    bigram_nats,
    bits_per_byte,
    count_bigrams,
    excerpts,
    measure_yardsticks,
)
from deepseek_jax.training.checkpoint import Progress
from tests.training.nano import get_config

pytestmark = pytest.mark.xdist_group("yardsticks")  # what one worker made or compiled, its other tests use


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for number in range(40):
        text = "".join(generator.choice(list("abcdefgh é\n"), size=1500))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(corpus):
    tree = get_config(str(corpus))
    tree.training.eval_batches = 10**6  # all there are
    return from_config_dict(tree)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    open_tokenizer(config, folder)
    return folder


@pytest.fixture
def tokenizer(config, workdir):
    return open_tokenizer(config, workdir)


def batch_of(pairs: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    tokens, targets = np.array(pairs, np.int32).T
    return {
        "tokens_BS": tokens[None],
        "targets_BS": targets[None],
        "loss_weights_BS": np.ones((1, len(pairs)), np.float32),
    }


def witten_bell(pairs: list[tuple[int, int]], size: int, a: int, b: int) -> float:
    """p(b | a) by the definition, with dictionaries."""
    first = Counter(b for _, b in pairs)
    p = (first[b] + len(first) / size) / (len(pairs) + len(first))
    followers = Counter(y for x, y in pairs if x == a)
    if not followers:
        return p
    return (followers[b] + len(followers) * p) / (followers.total() + len(followers))


def test_the_bigram_is_the_definition():
    size, generator = 7, np.random.default_rng(0)
    pairs = [tuple(pair) for pair in generator.integers(0, 5, size=(60, 2)).tolist()]
    keys, counts = np.unique([a * size + b for a, b in pairs], return_counts=True)
    everything = [(a, b) for a in range(size) for b in range(size)]  # unseen contexts, unseen followers, both
    expected = -sum(math.log(witten_bell(pairs, size, a, b)) for a, b in everything)
    assert bigram_nats(Bigram(keys, counts, size), [batch_of(everything)]) == pytest.approx(expected, rel=1e-12)


def test_the_bigram_is_a_distribution():
    size = 6
    bigram = Bigram(np.array([0, 1, 7, 9]), np.array([3, 1, 2, 5]), size)
    for a in range(size):
        probabilities = [math.exp(-bigram_nats(bigram, [batch_of([(a, b)])])) for b in range(size)]
        assert sum(probabilities) == pytest.approx(1.0, abs=1e-12)


def test_a_bigram_that_has_seen_nothing_is_uniform():
    nothing = Bigram(np.zeros(0, np.int64), np.zeros(0, np.int64), 262)
    assert bigram_nats(nothing, [batch_of([(0, 1), (2, 3)])]) == pytest.approx(2 * math.log(262))


def test_exactly_the_tokens_of_the_run_are_counted(config, workdir, tokenizer, monkeypatch):
    """Rows read in batches of 8, with a restart in the middle, against rows read by the counter."""
    monkeypatch.setattr(yardsticks, "ROWS_AT_ONCE", 7)
    seen, size = Counter(), config.model.vocab_size
    loader = make_train_loader(config, tokenizer, workdir)
    for number in range(30):
        if number == 13:
            state = loader.state()
            loader.close()
            loader = make_train_loader(config, tokenizer, workdir)
            loader.restore(state)
        batch = loader.next_batch(8)
        keep = batch["loss_weights_BS"] > 0
        seen.update(zip(batch["tokens_BS"][keep].tolist(), batch["targets_BS"][keep].tolist(), strict=True))
    loader.close()
    fresh = make_train_loader(config, tokenizer, workdir)
    bigram = count_bigrams(fresh, 30 * 8, size)
    fresh.close()
    assert {
        divmod(key, size): count for key, count in zip(bigram.keys.tolist(), bigram.counts.tolist(), strict=True)
    } == seen


def test_compressors_see_the_same_bytes_as_the_model(config, workdir, tokenizer):
    held_out = open_held_out(config, tokenizer, workdir)
    rows, documents = list(excerpts(held_out, tokenizer)), list(held_out.texts())
    assert sum(map(len, rows)) == sum(map(len, documents)) == held_out.num_bytes
    assert b"".join(rows) == b"".join(documents)
    assert max(map(len, rows)) <= config.data.sequence_length  # bytes are tokens here
    measured = measure_yardsticks(config, workdir, tokenizer, 8 * 32 * 30)
    num_bits = 8 / held_out.num_bytes
    assert measured["yardstick/gzip_pieces_bits_per_byte"] == pytest.approx(
        num_bits * sum(len(gzip.compress(row, 9)) for row in rows if row)
    )
    assert measured["yardstick/gzip_files_bits_per_byte"] == pytest.approx(
        num_bits * sum(len(gzip.compress(text, 9)) for text in documents)
    )
    assert measured["yardstick/xz_files_bits_per_byte"] == pytest.approx(
        num_bits * sum(len(lzma.compress(text, preset=9)) for text in documents)
    )
    # eleven equally likely characters, one of them of two bytes: log2(11) * 11 / 12
    assert 2.5 < measured["yardstick/bigram_bits_per_byte"] < 3.6


def test_yardsticks_of_a_mixture_are_means_by_weight(config, corpus, workdir, tokenizer, tmp_path):
    for number in range(20):  # longer documents of one letter: pooled they would be most of the figure
        (tmp_path / f"{number}.txt").write_text("a" * (7000 + number))
    alone = [
        measure_yardsticks(config.with_(data={"sources": (Source(path=str(path), weight=1.0),)}), workdir, tokenizer, 0)
        for path in (corpus, tmp_path)
    ]
    sources = (Source(path=str(corpus), weight=3.0), Source(path=str(tmp_path), weight=1.0))
    mixed = measure_yardsticks(config.with_(data={"sources": sources}), workdir, tokenizer, 0)
    assert len(mixed) == 4
    for key, value in mixed.items():
        assert value == pytest.approx(0.75 * alone[0][key] + 0.25 * alone[1][key], rel=1e-12)
    assert alone[0]["yardstick/gzip_files_bits_per_byte"] > 20 * alone[1]["yardstick/gzip_files_bits_per_byte"]


def test_yardsticks_do_not_depend_on_the_number_of_processes(config, workdir, tokenizer, monkeypatch):
    """Every process measures the whole text: half of the rows would halve the bits, over bytes that are still all."""
    alone = measure_yardsticks(config, workdir, tokenizer, 8 * 32 * 30)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert measure_yardsticks(config, workdir, tokenizer, 8 * 32 * 30) == alone


def test_the_bigram_is_left_out_beyond_the_limit_and_says_so(config, workdir, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(yardsticks, "MOST_COUNTED_TOKENS", 100)
    logging.get_absl_logger().addHandler(caplog.handler)
    assert measure_yardsticks(config, workdir, tokenizer, 8 * 32)["yardstick/bigram_bits_per_byte"] is None
    logging.get_absl_logger().removeHandler(caplog.handler)
    assert "left out: 256 tokens seen, at most 100" in caplog.text


def test_bits_per_byte_counts_each_text_alone():
    assert bits_per_byte(lambda text: b"x" * 3, [b"ab", b"", b"abcd"]) == 8 * 6 / 6


def test_another_corpus_than_that_of_the_checkpoint_is_refused(config, workdir, tokenizer):
    corpus = open_corpus(config, tokenizer, workdir)
    loader = make_train_loader(config, tokenizer, workdir)
    check_corpus(Progress(step=1, tokens_seen=1, data=loader.state()), corpus)
    check_corpus(Progress(step=0, tokens_seen=0, data=None), corpus)
    loader.close()
    with pytest.raises(ValueError, match=r"hold another corpus \(SHA-256 0000.* restore its files, or name the folder"):
        check_corpus(Progress(step=1, tokens_seen=1, data=loader.state()), corpus._replace(digest="0" * 64))


def test_a_workdir_without_a_checkpoint_is_named(config, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoints"):
        evaluate_workdir(config, tmp_path)
