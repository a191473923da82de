"""A grammar asked token by token."""

import re
from collections.abc import Callable

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.job import Grammar


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text`, its special tokens as tokens."""
    ids = tokenizer.special_ids
    parts = re.split("(<[｜|][^｜|]*[｜|]>|</?think>)", text)
    return [i for part in parts for i in ([ids[part]] if part in ids else tokenizer.encode(part))]


def allowed(grammar: Grammar, vocab_size: int) -> np.ndarray:
    """Return the tokens that may come next, in order."""
    words_W = np.full(-(-vocab_size // 32), 0x55, np.int32)
    grammar.fill(words_W)
    return np.unpackbits(words_W.view(np.uint8), bitorder="little").nonzero()[0]


def refused(make: Callable[[], Grammar], tokenizer: Tokenizer, text: str, vocab_size: int) -> str | None:
    """Return what is left of `text`, EOS behind it, where a grammar does not let it go on; None if it takes all."""
    grammar, ids = make(), [*spelled(tokenizer, text), tokenizer.eos]
    for i, token in enumerate(ids):
        if token not in allowed(grammar, vocab_size):
            return tokenizer.decode(ids[i:]) or "EOS"
        grammar.accept(token)
    return None
