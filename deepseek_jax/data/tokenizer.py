"""Text to token ids and back: any `tokenizer.json`, ours among them, whole or as a stream.

A tokenizer is one `tokenizers.Tokenizer` plus the ids of its special tokens, whatever it was made from. It is saved as
`tokenizer.json` with a `tokenizer_config.json` beside it that names BOS, EOS and padding, as Hugging Face has it.
"""

import codecs
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from deepseek_jax.data.encoders import Encoders
from deepseek_jax.data.encoding import Ids, encode_text, encode_texts
from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import read_json, read_text, shown

# V3's names. BOS, EOS and padding have V3's ids too, 0 to 2. V3's FIM tokens are 128,800 to 128,802, ours 3 to 5.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)
# R1's marks around its reasoning: special tokens that are yet part of the text that a reader sees.
THINK_TOKENS = ("<think>", "</think>")

# Special tokens are known by their form: the released file calls most of its own, like <｜User｜>, not special.
SPECIAL_FORM = re.compile("<[｜|][^<>｜|]+[｜|]>|</?think>")

CONFIG_NAME = "tokenizer_config.json"  # the file beside a tokenizer.json
TOKENIZER_FILES = ("tokenizer.json", CONFIG_NAME)


class Tokenizer:
    """Text to ids and back.

    `bos`, `eos`, `pad`, `fim_begin`, `fim_hole` and `fim_end` are ids; the FIM ones are None in a tokenizer without
    them. `special_ids` maps the text of every special token to its id. `vocab_size` is the largest id plus one: the
    smallest `model.vocab_size` that fits.
    """

    def __init__(self, encoder: tokenizers.Tokenizer, bos: str, eos: str, pad: str):
        """Wrap `encoder`; `bos`, `eos` and `pad` are texts of tokens in it."""
        encoder.no_truncation()
        encoder.no_padding()
        self._file = encoder.to_str()
        added = encoder.get_added_tokens_decoder().items()
        special = {
            token_id: token for token_id, token in added if token.special or SPECIAL_FORM.fullmatch(token.content)
        }
        for token in special.values():
            if not token.special:
                token.special = True
                encoder.add_special_tokens([token])
        # a document that spells "<｜end▁of▁sentence｜>" does not end there
        encoder.encode_special_tokens = True
        self._encoder = encoder
        self.special_ids = {token.content: token_id for token_id, token in special.items()}
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        ids = [encoder.token_to_id(name) for name in (bos, eos, pad)]
        self.bos, self.eos, self.pad = (token_id for token_id in ids if token_id is not None)
        self.fim_begin, self.fim_hole, self.fim_end = (
            encoder.token_to_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)
        )
        self.vocab_size = max(encoder.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a `tokenizer.json`.

        BOS, EOS and padding are named in the `tokenizer_config.json` beside it, or have V3's names. A tokenizer
        without a padding token pads with EOS, which is harmless: padding has no weight in a loss.

        Raises:
            ValueError: the file or the one beside it is missing or broken, or names no BOS or EOS.
        """
        path = Path(path)
        try:
            text = read_text(path)
        except ValueError as error:
            raise ValueError(f"{_unreadable(str(path))} ({error}); {_REMEDY}") from error
        beside = path.with_name(CONFIG_NAME)
        return cls.parse(text, read_json(beside) if os.path.lexists(beside) else {}, path)

    @classmethod
    def parse(cls, text: str, settings: Mapping[str, Any], path: Path) -> "Tokenizer":
        """Make a tokenizer from the text of a `tokenizer.json` and the parsed `tokenizer_config.json`, as `load` does.

        Raises:
            ValueError: as `load`; `path` is where the text comes from.
        """
        try:
            encoder = tokenizers.Tokenizer.from_str(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust side raises plain Exception, and a panic is no Exception
            raise ValueError(f"{_unreadable(str(path))} ({shown(str(error))}); {_REMEDY}") from error
        beside = path.with_name(CONFIG_NAME)
        names = [
            _special_name(encoder, settings.get(key), usual, f"{shown(str(beside))}: {key}")
            for key, usual in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD))
        ]
        if names[0] is None or names[1] is None:
            raise ValueError(
                f"{shown(str(path))} has no token {BOS!r} or {EOS!r}; name its bos_token and eos_token in"
                f" {shown(str(beside))}"
            )
        return cls(encoder, names[0], names[1], names[2] or names[1])

    def save(self, path: str | os.PathLike) -> None:
        """Write `path` and the `tokenizer_config.json` beside it, each completely or not at all."""
        self.save_names(path)
        write_atomically(Path(path), self._content)

    def save_names(self, path: str | os.PathLike) -> None:
        """Write the `tokenizer_config.json` beside `path` alone."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._names}
        write_atomically(Path(path).with_name(CONFIG_NAME), json.dumps(settings, ensure_ascii=False, indent=2))

    @property
    def content_digest(self) -> str:
        """SHA-256 of the tokenizer.json that `save` writes."""
        return hashlib.sha256(self._content.encode()).hexdigest()

    @property
    def _content(self) -> str:
        return tokenizers.Tokenizer.from_str(self._file).to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without BOS and EOS; a special token spelled in it is ordinary text.

        Raises:
            EncodingError: the tokenizer does not take it.
        """
        return encode_text(self._encoder, text)

    def encode_batch(self, texts: Sequence[str]) -> Ids:
        """Encode several texts, on all cores; one that the tokenizer does not take gets its EncodingError."""
        return encode_texts(self._encoder, texts)

    def encoders(self, num_processes: int) -> Encoders:
        """Return processes that encode as `encode_batch` does, for large corpora."""
        return Encoders(self._encoder, num_processes)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`.

        Special tokens other than `THINK_TOKENS` are left out. Bytes that are not UTF-8 become U+FFFD.
        """
        return self._encoder.decode([int(i) for i in ids if self.token_bytes[int(i)]], skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`, exact even if the first or the last character lacks some of its bytes.

        Special tokens other than `THINK_TOKENS` are left out.
        """
        return b"".join(self.token_bytes[int(i)] for i in ids)

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each id; none for unused ids and for special tokens other than `THINK_TOKENS`.

        They are exact for byte-level tokenizers. In SentencePiece's style "▁" is a space and "<0x0A>" a byte.
        """
        decode = _from_byte_level if '"ByteLevel"' in self._file else _from_sentencepiece
        pieces = [b""] * self.vocab_size
        for token, token_id in self._encoder.get_vocab(with_added_tokens=False).items():
            pieces[token_id] = decode(token)
        for token_id, added in self._encoder.get_added_tokens_decoder().items():
            hidden = added.content in self.special_ids and added.content not in THINK_TOKENS
            pieces[token_id] = b"" if hidden else added.content.encode()
        return tuple(pieces)

    @functools.cached_property
    def num_bytes_V(self) -> np.ndarray:
        """The number of UTF-8 bytes of each id, int64, for bits per byte."""
        return np.array([len(piece) for piece in self.token_bytes], np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file and of the names of BOS, EOS and padding."""
        return hashlib.sha256((self._file + json.dumps(self._names)).encode()).hexdigest()


class StreamDecoder:
    """Decodes ids as they come; a character that spans several tokens comes with the last of them.

    The texts joined are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Start a new text."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` complete; it may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """End the text and return its rest: U+FFFD if the last character lacks bytes, else nothing."""
        return self._decoder.decode(b"", final=True)


_REMEDY = "data.tokenizer takes 'bpe', 'byte' or such a file"


def _unreadable(origin: str) -> str:
    return f"{shown(origin)} is not a readable tokenizer.json"


def _special_name(encoder: tokenizers.Tokenizer, named: Any, usual: str, where: str) -> str | None:
    """Return `named` (a text, or Hugging Face's dict of a token) if `encoder` has it, else `usual`, else None."""
    name = named.get("content") if isinstance(named, dict) else named
    if named is not None and not isinstance(name, str):
        raise ValueError(f"{where} is {shown(repr(named))}, not the text of a token; repair or remove it")
    return next(
        (token for token in (name, usual) if isinstance(token, str) and encoder.token_to_id(token) is not None), None
    )


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """Return the character for each byte (GPT-2's table): printable Latin-1 is itself, the other 68 follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in range(256))


@functools.cache
def _symbol_bytes() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def _from_byte_level(token: str) -> bytes:
    table = _symbol_bytes()
    return bytes(table[symbol] for symbol in token) if all(symbol in table for symbol in token) else token.encode()


def _from_sentencepiece(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
