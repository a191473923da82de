"""FIM and splitting rearrange a document and lose none of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.data.augmentation import Augmentation, fill_in_middle, joined_tokens, split_joined
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.tokenizer import Tokenizer

TEXT = "def f(x):\n    return [x, 'é東京'];\n\n\nclass A:\n    pass\n" * 5


def sections(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """The prefix, suffix and middle of a FIM document, after checking its frame."""
    hole, end = (int(np.flatnonzero(ids == token)[0]) for token in (tokenizer.fim_hole, tokenizer.fim_end))
    assert ids[0] == tokenizer.fim_begin
    return tuple(tokenizer.decode(part) for part in (ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]))


@pytest.mark.parametrize("text", [TEXT, "é", ""])
def test_fim_round_trips(bpe, text):
    rng = np.random.default_rng(0)
    cuts = set()
    for _ in range(50):
        prefix, suffix, middle = sections(fill_in_middle(np.array(bpe.encode(text), int), bpe, rng), bpe)
        assert prefix + middle + suffix == text
        cuts |= {len(prefix), len(prefix + middle)}
    if text == TEXT:
        assert min(cuts) < 0.1 * len(text)
        assert max(cuts) > 0.9 * len(text)


def test_fim_happens_at_its_rate_and_keeps_bos_and_eos(bpe):
    ids, rng = np.array(bpe.encode("x = 1\n")), np.random.default_rng(0)
    augment = Augmentation(bpe, fim_rate=0.1, split_rate=0.0)
    results = [augment(ids, rng) for _ in range(2000)]
    assert all((result[0], result[-1]) == (bpe.bos, bpe.eos) for result in results)
    rearranged = sum(bpe.fim_begin in result for result in results)
    assert 160 <= rearranged <= 240  # binomial: 200, standard deviation 13.4
    assert all(result.tolist() == [bpe.bos, *ids, bpe.eos] for result in results if bpe.fim_begin not in result)


def test_fim_leaves_documents_with_special_tokens_alone(bpe):
    ids = np.array([*bpe.encode("question"), bpe.eos, *bpe.encode("answer")])
    assert Augmentation(bpe, 1.0, 0.0)(ids, np.random.default_rng(0))[1:-1].tolist() == ids.tolist()


def test_fim_without_its_tokens_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.fim_hole = None
    with pytest.raises(ValueError, match="data.fim_rate = 0.1 needs a tokenizer with .*; set data.fim_rate = 0"):
        Augmentation(tokenizer, 0.1, 0.0)


def test_joined_tokens_are_punctuation_then_line_breaks(bpe):
    _, num_parts_V = joined_tokens(bpe)
    joined = {bpe.token_bytes[i].decode() for i in np.flatnonzero(num_parts_V)}
    assert {":\n", ")\n", ",\n"} <= joined
    assert all(text != text.rstrip("\n") and text.strip() for text in joined)
    assert not any(text[:1].isalnum() for text in joined)
    pieces = [b";\n", b"=\n", b"a\n", b"\n", b")"]
    small = SimpleNamespace(token_bytes=pieces, vocab_size=5, encode=lambda text: list(text.encode()))
    assert joined_tokens(small)[1].tolist() == [2, 2, 0, 0, 0]  # symbols, too


def test_splitting_keeps_the_text(bpe):
    ids, tables = np.array(bpe.encode(TEXT)), joined_tokens(bpe)
    num_joined = int((tables[1][ids] > 1).sum())
    everything = split_joined(ids, *tables, 1.0, np.random.default_rng(0))
    assert bpe.decode(everything) == TEXT
    assert not (tables[1][everything] > 1).any()
    assert num_joined == 10
    nothing = split_joined(ids, *tables, 0.0, np.random.default_rng(0))
    assert nothing.tolist() == ids.tolist()


def test_splitting_happens_at_its_rate(bpe):
    ids, tables = np.tile(bpe.encode(TEXT), 200), joined_tokens(bpe)
    before = int((tables[1][ids] > 1).sum())
    split = split_joined(ids, *tables, 0.3, np.random.default_rng(0))
    assert 1 - (tables[1][split] > 1).sum() / before == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / before))
    assert bpe.decode(split) == TEXT * 200
