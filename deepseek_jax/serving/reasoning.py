"""A grammar that begins behind the reasoning: a model thinks freely, and only its answer is held to a schema.

the prompt ends with <think>      anything, </think>, perhaps line breaks, then the grammar
it does not                       the grammar, or <think> first where the model may think
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.tokenizer import THINK_TOKENS, Tokenizer
from deepseek_jax.inference.job import Grammar
from deepseek_jax.serving.grammar import set_bits

START, THINKING, BEHIND, ANSWER = "start", "thinking", "behind", "answer"


class Tokens(NamedTuple):
    """The tokens of a model that reasons.

    Attributes:
        think, end_think: its ids of `<think>` and `</think>`.
        free_W: what may come while it thinks: all but special tokens, and `end_think`.
        breaks: ids of one and two line breaks.
    """

    think: int
    end_think: int
    free_W: np.ndarray
    breaks: tuple[int, ...]


def reasoning_tokens(tokenizer: Tokenizer, vocab_size: int) -> Tokens | None:
    """Return the tokens of reasoning; None if the tokenizer has none."""
    think, end_think = (tokenizer.special_ids.get(name) for name in THINK_TOKENS)
    if think is None or end_think is None:
        return None
    pieces = tokenizer.token_bytes[:vocab_size]
    may = np.zeros(-(-vocab_size // 32) * 32, bool)
    may[: len(pieces)] = [len(piece) > 0 for piece in pieces]
    may[[i for i in tokenizer.special_ids.values() if i < vocab_size]] = False
    may[end_think] = True
    free_W = np.packbits(may, bitorder="little").view(np.int32)
    return Tokens(think, end_think, free_W, tuple(i for i, piece in enumerate(pieces) if piece in (b"\n", b"\n\n")))


def after_reasoning(make: Callable[[], Grammar], tokens: Tokens, thinking: bool) -> Callable[[], Grammar]:
    """Return what makes grammars that begin behind the reasoning.

    Args:
        make: makes the grammar of the answer.
        tokens: of the model.
        thinking: whether the prompt has opened the reasoning.
    """
    return lambda: _AfterReasoning(make(), tokens, THINKING if thinking else START)


class _AfterReasoning:
    def __init__(self, answer: Grammar, tokens: Tokens, state: str):
        self._answer, self._tokens, self._state = answer, tokens, state
        self._history: list[tuple[str, bool]] = []  # of each token: the state before it, and whether it was answered

    def fill(self, words_W: np.ndarray) -> None:
        """Write which tokens may come next."""
        if self._state == THINKING:
            words_W[:] = self._tokens.free_W
            return
        self._answer.fill(words_W)
        if self._state == START:
            set_bits(words_W, [self._tokens.think])
        elif self._state == BEHIND:
            set_bits(words_W, self._tokens.breaks)

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        before, answer = self._state, False
        if before == THINKING:
            self._state = BEHIND if token == self._tokens.end_think else THINKING
        elif before == START and token == self._tokens.think:
            self._state = THINKING
        else:
            answer = before != BEHIND or token not in self._tokens.breaks
            self._state = ANSWER
        if answer:
            self._answer.accept(token)
        self._history.append((before, answer))

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were accepted."""
        for _ in range(count):
            self._state, answer = self._history.pop()
            if answer:
                self._answer.rollback(1)
