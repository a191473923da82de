"""The text of a sequence: half characters and beginnings of stop strings are held back, and the pieces join to it."""

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.text import Text

TOKENIZER = byte_tokenizer()


def pieces_of(text, stop=(), cut=1, eos=False):
    """Push a text `cut` ids at a time; return the pieces, the last one from the end, and the `Text`."""
    ids = [*TOKENIZER.encode(text), *[TOKENIZER.eos] * eos]
    made = Text(TOKENIZER, stop)
    return [*(made.push(ids[i : i + cut]) for i in range(0, len(ids), cut)), made.finish()], made


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "want", "reason", "num_tokens"),
    [
        ("ab\n\ncd", ["\n\n"], "ab", "stop", 4),
        ("ab\nc\n\n\nd", ["\n\n"], "ab\nc", "stop", 6),
        ("aab aaab", ["aaab"], "aab ", "stop", 8),  # a false start that overlaps the true one
        ("ababac", ["abac"], "ab", "stop", 6),
        ("xENDy", ["y", "END"], "x", "stop", 4),  # the first to be complete
        ("ab\n", ["\n\n"], "ab\n", "length", 3),
        ("ab", [], "ab", "length", 2),
        ("a€b", ["€"], "a", "stop", 4),
        ("", ["x"], "", "length", 0),
    ],
)
def test_a_text_ends_before_the_first_stop_string(text, stop, want, reason, num_tokens, cut):
    pieces, made = pieces_of(text, stop, cut)
    assert ("".join(pieces), made.reason, made.num_tokens) == (want, reason, num_tokens)


def test_what_comes_after_the_end_is_ignored():
    made = Text(TOKENIZER, ["b"])
    assert [made.push(TOKENIZER.encode("ab")), made.push(TOKENIZER.encode("ccc")), made.finish()] == ["a", "", ""]
    assert made.num_tokens == 2


def test_eos_releases_what_was_held_back():
    pieces, made = pieces_of("ab\n", ["\n\n"], eos=True)
    assert pieces == ["a", "b", "", "\n", ""] and (made.reason, made.num_tokens) == ("stop", 3)


def test_half_a_character_waits_for_the_other_half():
    euro = TOKENIZER.encode("€")
    made = Text(TOKENIZER)
    assert [made.push(euro[:2]), made.push(euro[2:] + euro[:1]), made.finish()] == [
        "",
        "€",
        "\N{REPLACEMENT CHARACTER}",
    ]


def test_random_texts_are_cut_where_find_cuts_them():
    """Against `str.find`, for stop strings that overlap themselves and each other."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab"), 20))
        stop = ["".join(rng.choice(list("ab"), rng.integers(2, 6))) for _ in range(2)]
        ends = [(start + len(s), start) for s in stop if (start := text.find(s)) >= 0]
        first = min(end for end, _ in ends) if ends else 0
        want = text[: min(start for end, start in ends if end == first)] if ends else text
        assert "".join(pieces_of(text, stop, int(rng.integers(1, 9)))[0]) == want, (text, stop)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        Text(TOKENIZER, ["x", ""])
