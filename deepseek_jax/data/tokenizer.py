"""Byte-level BPE with DeepSeek-V3's pre-tokenizer, a byte tokenizer, and any other `tokenizer.json`.

The pre-tokenizer cuts text into words that no merge may cross. V3's has four stages; each isolates what it matches and
leaves the rest to the next (the released tokenizer.json; report section 4.1):

    1. digits        "12345" -> "123" "45"              numbers become groups of at most three digits
    2. CJK and kana  "東京は3" -> "東京は" "3"           runs without spaces stay apart from Latin text
    3. words         "foo(bar):\\n\\n  x" -> "foo" "(bar" "):\\n\\n" " " " x"
    4. bytes         every UTF-8 byte becomes one of 256 printable characters, so no text is unknown

In stage 3 one ASCII punctuation mark sticks to the letters after it ("(bar"), and a run of punctuation takes the line
breaks that follow ("):\\n\\n"). The latter is new in V3 and the reason for `augmentation.split_joined`.

A tokenizer is one `tokenizers.Tokenizer` plus the ids of its special tokens, whatever it was made from; the byte
tokenizer is BPE without merges. It is saved as `tokenizer.json` with a `tokenizer_config.json` beside it that names
BOS, EOS and padding, as Hugging Face has it.
"""

import codecs
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from deepseek_jax.config import Config
from deepseek_jax.data.encoders import Encoders
from deepseek_jax.files import write_atomically

# V3's names. BOS, EOS and padding have V3's ids too, 0 to 2; its FIM tokens are 128,800 to 128,802, ours follow at 3 to
# 5.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)
THINK_TOKENS = (
    "<think>",
    "</think>",
)  # R1's marks around its reasoning: tokens, and yet part of the text that a reader sees

# The released file calls most of its own special tokens, <｜User｜> and <｜Assistant｜> among them, not special;
# their form tells.
SPECIAL_FORM = re.compile("<[｜|][^<>｜|]+[｜|]>|</?think>")

DIGITS = r"\p{N}{1,3}"
CJK = "[一-龥぀-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""  # one punctuation mark and the letters after it
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"  # a word, with the space before it
    "| ?[\\p{P}\\p{S}]+[\r\n]*"  # punctuation, with the line breaks after it
    "|\\s*[\r\n]+"  # blank lines and the end of a line
    r"|\s+(?!\S)"  # indentation, except its last space
    r"|\s+"
)


class Tokenizer:
    """Text to ids and back.

    `bos`, `eos` and `pad` are ids; `fim_begin`, `fim_hole` and `fim_end` are ids, or None where the tokenizer has no
    such token. `special_ids` maps the text of every special token to its id. `vocab_size` is the largest id plus one,
    the least `model.vocab_size` that fits.
    """

    def __init__(self, encoder: tokenizers.Tokenizer, bos: str, eos: str, pad: str):
        """Wrap `encoder`; `bos`, `eos` and `pad` are the texts of tokens that it has."""
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
        encoder.encode_special_tokens = (
            True  # the text "<｜end▁of▁sentence｜>" in a document is text, not the end of it
        )
        self._encoder = encoder
        self.special_ids = {token.content: token_id for token_id, token in special.items()}
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.bos, self.eos, self.pad = (encoder.token_to_id(name) for name in (bos, eos, pad))
        self.fim_begin, self.fim_hole, self.fim_end = (
            encoder.token_to_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)
        )
        self.vocab_size = max(encoder.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a `tokenizer.json`. BOS, EOS and padding are V3's names, or those in the `tokenizer_config.json` beside
        it.

        A tokenizer without a padding token pads with EOS, which is harmless: padding never has weight in a loss.

        Raises:
            ValueError: the file is missing or broken, or names no BOS or EOS.
        """
        path = Path(path)
        try:
            encoder = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(
                f"{path} is not a readable tokenizer.json ({error}); data.tokenizer takes 'bpe', 'byte' or such a file"
            ) from error
        beside = path.with_name("tokenizer_config.json")
        named = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        names = [
            _special_name(encoder, named.get(key), usual)
            for key, usual in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD))
        ]
        if names[0] is None or names[1] is None:
            raise ValueError(f"{path} has no token {BOS!r} or {EOS!r}; name its bos_token and eos_token in {beside}")
        return cls(encoder, names[0], names[1], names[2] or names[1])

    def save(self, path: str | os.PathLike) -> None:
        """Write `path` and the `tokenizer_config.json` beside it, each whole or not at all."""
        path = Path(path)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._names}
        write_atomically(path.with_name("tokenizer_config.json"), json.dumps(settings, ensure_ascii=False, indent=2))
        write_atomically(path, tokenizers.Tokenizer.from_str(self._file).to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with no BOS or EOS added. Special tokens spelled out in `text` are encoded as
        ordinary characters.
        """
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts, in parallel over the cores."""
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encoders(self, num_processes: int) -> Encoders:
        """Return processes that encode as `encode_batch` does, for much text."""
        return Encoders(self._encoder, num_processes)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens, except `THINK_TOKENS`; bytes that are not UTF-8 become
        U+FFFD.
        """
        return self._encoder.decode([int(i) for i in ids if self.token_bytes[int(i)]], skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids` without special tokens: exact where a piece of text starts or ends inside a
        character.
        """
        return b"".join(self.token_bytes[int(i)] for i in ids)

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes each id stands for; none for unused ids and for special tokens other than `THINK_TOKENS`.

        Exact for byte-level tokenizers. For SentencePiece-style ones "▁" is a space and "<0x0A>" a byte.
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
        """UTF-8 bytes per token id, int64, for bits per byte."""
        return np.array([len(piece) for piece in self.token_bytes], np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer: equal for tokenizers that encode alike."""
        return hashlib.sha256((self._file + json.dumps(self._names)).encode()).hexdigest()


class StreamDecoder:
    """Decodes ids as they come. A character whose bytes span tokens comes out whole, with its last byte.

    The pieces joined are `Tokenizer.decode` of all ids: bytes that are not UTF-8 become U+FFFD, special tokens nothing.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Start an empty text."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` complete, perhaps none."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """Return what is left at the end: U+FFFD if the last character lacks bytes. The next `push` starts a new
        text.
        """
        return self._decoder.decode(b"", final=True)


def make_tokenizer(config: Config, workdir: str | os.PathLike, documents: Iterable[str]) -> Tokenizer:
    """Return the run's tokenizer: the one cached in `workdir`, or a new one made as `data.tokenizer` says and cached
    there.

    Args:
        config: "bpe" trains up to `model.vocab_size` entries; "byte"; or the path of a tokenizer.json.
        workdir: `tokenizer.json` in it is loaded if it exists, whatever the config says.
        documents: texts of the train split. Read only if a BPE has to be trained.

    Raises:
        ValueError: the tokenizer has ids that `model.vocab_size` cannot hold.
    """
    cached = Path(workdir) / "tokenizer.json"
    if cached.exists():
        tokenizer, origin = Tokenizer.load(cached), str(cached)
    elif config.data.tokenizer == "bpe":
        tokenizer, origin = train_bpe(documents, config.model.vocab_size), "the trained tokenizer"
    elif config.data.tokenizer == "byte":
        tokenizer, origin = byte_tokenizer(), "the byte tokenizer"
    else:
        tokenizer, origin = Tokenizer.load(config.data.tokenizer), config.data.tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{origin} needs {tokenizer.vocab_size} ids and model.vocab_size = {config.model.vocab_size};"
            f" set model.vocab_size to at least {tokenizer.vocab_size}, or use another data.tokenizer"
        )
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(cached)
    return tokenizer


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with V3's pre-tokenizer. The same documents in the same order give the same tokenizer.

    A corpus too small for `vocab_size` entries gives fewer.
    """
    encoder = _untrained()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(
            f"model.vocab_size = {vocab_size} is too small for BPE: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            " need 262"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        initial_alphabet=alphabet,
        min_frequency=2,  # a pair seen once teaches nothing
        show_progress=sys.stderr.isatty(),
    )
    encoder.train_from_iterator(documents, trainer)
    return Tokenizer(encoder, BOS, EOS, PAD)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose tokens are the 256 bytes: ids 0 to 5 are special, byte b is 6 + b."""
    symbols = _byte_symbols()
    vocabulary = {symbols[byte]: len(SPECIAL_TOKENS) + byte for byte in range(256)}
    vocabulary |= {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    encoder = _untrained(models.BPE(vocab=vocabulary, merges=[]))
    encoder.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return Tokenizer(encoder, BOS, EOS, PAD)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Return V3's four stages."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(CJK), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _untrained(model: models.Model | None = None) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(model or models.BPE())
    encoder.pre_tokenizer = pre_tokenizer()
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _special_name(encoder: tokenizers.Tokenizer, named: str | dict | None, usual: str) -> str | None:
    """Return the first of `named` (a string, or Hugging Face's dict of an added token) and `usual` that `encoder`
    has.
    """
    name = named["content"] if isinstance(named, dict) else named
    return next(
        (token for token in (name, usual) if token is not None and encoder.token_to_id(token) is not None), None
    )


@functools.cache
def _byte_symbols() -> tuple[str, ...]:
    """Return the character that stands for each byte: printable Latin-1 for itself, the other 68 from U+0100 on
    (GPT-2's table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in range(256))


@functools.cache
def _symbol_bytes() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(_byte_symbols())}


def _from_byte_level(token: str) -> bytes:
    table = _symbol_bytes()
    return bytes(table[symbol] for symbol in token) if all(symbol in table for symbol in token) else token.encode()


def _from_sentencepiece(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
