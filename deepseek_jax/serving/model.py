"""What is served: an engine, its tokenizer, and what a client may know of the model."""

import dataclasses
import functools
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.job import TextEngine

if TYPE_CHECKING:
    from deepseek_jax.serving.chat_format import ChatFormat
    from deepseek_jax.serving.grammar import Grammars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model that makes texts.

    Attributes:
        name: what clients call it.
        num_positions: of prompt and text together.
        most_jobs: texts that one request may ask for.
        chat: how conversations become prompts; None for a model without a chat template.
        sampling: fields of `inference.sampling.Sampling` where the client says nothing.
        ends: ids that end a text, beside EOS.
        grammars: what makes grammars of JSON schemas for its tokens.
    """

    name: str
    engine: TextEngine
    tokenizer: Tokenizer
    num_positions: int
    most_jobs: int
    chat: "ChatFormat | None" = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()
    grammars: "Grammars | None" = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def vocab_size(self) -> int:
        """Ids that a prompt may have."""
        return self.tokenizer.vocab_size

    def described(self) -> dict[str, Any]:
        """Return what `/v1/models` says."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "deepseek-jax",
            "max_model_len": self.num_positions,
            "vocab_size": self.vocab_size,
            "chat": self.chat is not None,
        }

    @functools.cached_property
    def special_texts(self) -> dict[int, str]:
        """The text of every special token."""
        return {token: text for text, token in self.tokenizer.special_ids.items()}

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the ids of a prompt in text, with BOS in front unless it is there.

        Special tokens that are spelled in it become special tokens: the writer of a bare prompt may say everything.

        Raises:
            EncodingError: the tokenizer does not take it.
        """
        ids: list[int] = []
        for i, part in enumerate(self._special.split(text)):
            ids += [self.tokenizer.special_ids[part]] if i % 2 else self.tokenizer.encode(part)
        return [self.tokenizer.bos, *ids] if bos and ids[:1] != [self.tokenizer.bos] else ids

    def spell(self, token: int) -> str:
        """Return a token as lists of log-probabilities show it: a part of a character as "bytes:\\xe2\\x80"."""
        if special := self.special_texts.get(token):
            return special
        piece = self.tokenizer.token_bytes[token] if token < self.vocab_size else b""
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.tokenizer.special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")
