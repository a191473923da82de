"""Grammars: which tokens may come next, so that a text fits a JSON schema or is a call of a tool. llguidance has the
parser and the tables, and only this module knows it.

    grammars = Grammars(tokenizer, vocab_size)      the tables: a second, once
    make = grammars.schema({...}, "json_schema")    compiled, or a ValueError; kept for the next request
    grammar = make()                                for one text, microseconds
    grammar.fill(words_W); grammar.accept(token)

A text may end exactly where it is complete. Blanks between the parts of JSON are bounded: a model cannot write them
for ever.
"""

import functools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llguidance
import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.job import Grammar
from deepseek_jax.inputs import shown
from deepseek_jax.serving.schema import schema_text

MOST_COMPILED = 64  # grammars that are kept
_OPTIONS: Any = {"whitespace_pattern": r"[ \t\n\r]{0,64}", "lenient": False}
# Per text: steps of some 10 ms at most, and lexers of some 100 MB at most.
# A compilation: 2 s at most; more symbols than 65,535 are a panic, which llguidance catches.
_LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, max_grammar_size=60_000, verbose_errors=False)


class Grammars:
    """Compiles grammars for one tokenizer; any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Iterable[int] = ()):
        """Bind a tokenizer.

        Args:
            tokenizer: of the model.
            vocab_size: of the model, V; ids that the tokenizer does not have never come.
            ends: tokens that end a text beside EOS.
        """
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.ends = tuple(sorted({tokenizer.eos, *ends}))
        self._compiled = functools.lru_cache(MOST_COMPILED)(self._compile)

    def schema(self, schema: Any, name: str) -> Callable[[], Grammar]:
        """Return what makes grammars of the JSON texts that fit `schema`, a JSON schema.

        Raises:
            ValueError: nothing fits the schema, or it is too large, wrong or not supported; `name` says which.
        """
        source = llguidance.LLMatcher.grammar_from_json_schema(schema_text(schema, name), overrides=_OPTIONS)
        return self._make(source, name)

    def lark(self, source: str, name: str) -> Callable[[], Grammar]:
        """Return what makes grammars of `source`, a grammar in llguidance's form of Lark.

        Raises:
            ValueError: no text fits it, or it is too large, wrong or not supported; `name` says which.
        """
        return self._make(llguidance.LLMatcher.grammar_from_lark(source), name)

    def _make(self, source: str, name: str) -> Callable[[], Grammar]:
        found = self._compiled(source)
        if isinstance(found, str):
            raise ValueError(f"{name} cannot be used: {found}")
        return lambda: _Matched(found.deep_copy(), self.vocab_size, self.ends)

    def _compile(self, source: str) -> llguidance.LLMatcher | str:
        """Return a matcher that stands at the beginning, or what is wrong."""
        with _building:  # once, whoever asks
            table = _table(self._tokenizer, self.vocab_size, self.ends)
        matcher = llguidance.LLMatcher(table, source, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the work of the first token is done once
            if matcher.stop_reason().startswith("NoExtension") and not matcher.is_accepting():
                return "no text fits it"
        return _told(matcher) if matcher.is_error() else matcher


def json_rule(schema: Any, name: str) -> str:
    """Return the rule of a Lark grammar for the JSON texts that fit `schema`.

    Raises:
        ValueError: as `schema_text`.
    """
    text = schema_text(schema, name)
    return "%json " + json.dumps({**json.loads(text), "x-guidance": _OPTIONS}, ensure_ascii=False)


class _Matched:
    """The grammar of one text."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, ends: Sequence[int]):
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._ends = ends
        self._ended = 0  # tokens that were accepted behind the end, itself included

    def fill(self, words_W: np.ndarray) -> None:
        """Write which tokens may come next, as `inference.job.Grammar` has it.

        Raises:
            RuntimeError: the text has become too complex for the parser.
        """
        if words_W.shape != (self._num_words,) or words_W.dtype != np.int32 or not words_W.flags.c_contiguous:
            raise ValueError(f"words_W is {words_W.dtype}{list(words_W.shape)}, not int32[{self._num_words}]")
        if self._ended:
            words_W[:] = 0
            set_bits(words_W, self._ends)
            return
        self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        self._check()

    def accept(self, token: int) -> None:
        """Go on behind a token.

        Raises:
            RuntimeError: the token may not come here, or the text has become too complex.
        """
        if self._ended or token in self._ends:
            self._ended += 1
        else:
            self._matcher.consume_token(token)
            self._check()

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were accepted."""
        behind = min(count, self._ended)
        self._ended -= behind
        if count > behind:
            self._matcher.rollback(count - behind)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar of this text stopped: {_told(self._matcher)}")


_building = threading.Lock()


@functools.lru_cache(maxsize=4)
def _table(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> llguidance.LLTokenizer:
    wrapper = llguidance.TokenizerWrapper(_Tokens(tokenizer, vocab_size))
    return llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(ends))


class _Tokens:
    """A tokenizer as llguidance wants it: the bytes of every token; special ones begin with 0xFF, which no text has."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        names = {token_id: name for name, token_id in tokenizer.special_ids.items()}
        pieces = [*tokenizer.token_bytes[:vocab_size], *[b""] * (vocab_size - tokenizer.vocab_size)]
        self.tokens = [b"\xff" + names[i].encode() if i in names else piece for i, piece in enumerate(pieces)]
        self.special_token_ids = sorted(i for i in names if i < vocab_size)
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode(errors="replace"))


def set_bits(words_W: np.ndarray, tokens: Iterable[int]) -> None:
    """Let tokens come next."""
    bits_W = words_W.view(np.uint32)
    for token in tokens:
        bits_W[token // 32] |= np.uint32(1 << token % 32)


def _told(matcher: llguidance.LLMatcher) -> str:
    return shown(matcher.get_error().split("<state>")[0].split("<non-verbose/>")[0].strip())[:300]
