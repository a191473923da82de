"""A grammar that begins behind the reasoning: a model thinks freely, and only its answer is held to a schema.

    the prompt ends with <think>      anything, </think>, line breaks, then the grammar
    it does not                       the grammar, or <think> first where the model may think
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.tokenizer import THINK_TOKENS, Tokenizer
from deepseek_jax.inference.job import Grammar
from deepseek_jax.serving.grammar import set_bits

START, THINKING, BREAKS, ANSWER = "start", "thinking", "breaks", "answer"


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


def find_tokens(tokenizer: Tokenizer, vocab_size: int) -> Tokens | None:
    """Return the tokens of reasoning; None if the tokenizer has none."""
    think, end_think = (tokenizer.special_ids.get(name) for name in THINK_TOKENS)
    if think is None or end_think is None:
        return None
    special = set(tokenizer.special_ids.values())
    free_W = np.zeros(-(-vocab_size // 32), np.int32)
    pieces = tokenizer.token_bytes[:vocab_size]
    set_bits(free_W, (i for i, piece in enumerate(pieces) if piece and i not in special))
    set_bits(free_W, [end_think])
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
        self._states: list[str] = []  # before each token of those that came before the answer
        self._num_answered = 0

    def fill(self, words_W: np.ndarray) -> None:
        """Write which tokens may come next."""
        if self._state == THINKING:
            words_W[:] = self._tokens.free_W
            return
        self._answer.fill(words_W)
        if self._state == START:
            set_bits(words_W, [self._tokens.think])
        elif self._state == BREAKS:
            set_bits(words_W, self._tokens.breaks)

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        if self._state == ANSWER:
            self._answer.accept(token)
            self._num_answered += 1
            return
        self._states.append(self._state)
        if self._state == START and token == self._tokens.think:
            self._state = THINKING
        elif self._state == THINKING:
            self._state = BREAKS if token == self._tokens.end_think else THINKING
        elif self._state == BREAKS and token in self._tokens.breaks:
            # two of them at most
            self._state = ANSWER if self._states[-2:-1] == [BREAKS] else BREAKS
        else:
            self._states.pop()
            self._before_answer, self._state = self._state, ANSWER
            self.accept(token)

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were accepted."""
        answered = min(count, self._num_answered)
        if answered:
            self._answer.rollback(answered)
            self._num_answered -= answered
            if not self._num_answered:
                self._state = self._before_answer
        for _ in range(count - answered):
            self._state = self._states.pop()
