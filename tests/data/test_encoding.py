"""A text that the tokenizer does not take is one item, in this process and in others."""

import pickle

import numpy as np
import pytest

from deepseek_jax.data import encoding, token_cache
from deepseek_jax.data.encoders import Encoders
from deepseek_jax.data.encoding import EncodingError, encode_texts
from deepseek_jax.data.token_cache import open_corpus
from tests.support.array_records import write_array_record


class Panic(BaseException):
    """What pyo3 raises where Rust panics is no Exception either."""


class Panicking:
    """Panics at a text, as the regular expressions of `tokenizers` do at ten million spaces."""

    def __init__(self, encoder):
        self._encoder = encoder

    def encode_batch_fast(self, texts, **settings):
        if any("spaces" in text for text in texts):
            raise Panic("retry-limit-in-match over")
        return self._encoder.encode_batch_fast(texts, **settings)


def test_one_text_is_one_error(words):
    answers = encode_texts(Panicking(words._encoder), ["good good", "spaces", "evil", "good", "\ud800"])
    assert [list(answers[i]) for i in (0, 3)] == [[2, 2], [2]]
    assert "retry-limit-in-match over" in str(answers[1])
    assert "Missing [UNK]" in str(answers[2])
    assert "half of a character" in str(answers[4])
    assert str(pickle.loads(pickle.dumps(answers[1]))) == str(answers[1])
    with pytest.raises(EncodingError, match="half of a character"):
        words.encode("\ud800")
    for error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error):
            encode_texts(Panicking(Raising(error)), ["good"])


class Raising:
    def __init__(self, error):
        self._error = error

    def encode_batch_fast(self, texts, **settings):
        raise self._error


def test_a_long_text_has_the_ids_of_a_short_one(words, monkeypatch):
    """It takes another way, on which it holds up no other thread."""
    text = "good " * 50
    short = words.encode(text)
    monkeypatch.setattr(encoding, "LONG", 100)
    assert words.encode(text) == short and isinstance(short, list)


def test_other_processes_answer_alike(words):
    texts = ["good", "evil", "good good"]
    with Encoders(words._encoder, 1) as encoders:
        (answer,) = encoders.map([texts])
    here = words.encode_batch(texts)
    assert list(answer[0]) == list(here[0]) and list(answer[2]) == list(here[2])
    assert str(answer[1]) == str(here[1])


@pytest.mark.parametrize("large", [False, True])
def test_they_are_named_and_skipped(tmp_path, make_config, words, large, monkeypatch):
    """Case 09, and ids that the tokenizer does not have."""
    monkeypatch.setattr(token_cache, "SMALL_CORPUS", 0 if large else 10**6)
    monkeypatch.setattr(token_cache, "FEW_CORES", 0)
    monkeypatch.setattr(token_cache.os, "sched_getaffinity", lambda _: {0})
    (tmp_path / "corpus").mkdir()
    for i in range(6):
        (tmp_path / "corpus" / f"{i}.txt").write_text("good " * (i + 1))
    (tmp_path / "corpus" / "bad.txt").write_text("good evil")
    ids = [np.full(i + 1, 2, "<i4").tobytes() for i in range(6)] + [np.array([2, 3], "<i4").tobytes()]
    write_array_record(tmp_path / "ids.array_record", ids)
    for path, fault in (
        ("corpus", r"corpus: bad.txt cannot be tokenised: the tokenizer does not take it: WordLevel error"),
        ("ids.array_record", r"ids.array_record: ids.array_record:6 has token id 3 and the vocabulary ends at 2; set"),
    ):
        with pytest.raises(ValueError, match=fault):
            open_corpus(make_config(tmp_path / path), words, tmp_path / "work")
        corpus = open_corpus(make_config(tmp_path / path, on_error="skip"), words, tmp_path / "work")
        assert corpus.num_skipped == 1
        assert sum(map(len, (*corpus.train, *corpus.heldout))) == 6
