"""Tokenizers that are made here: byte-level BPE with DeepSeek-V3's pre-tokenizer, and plain bytes.

The pre-tokenizer cuts text into words that no merge may cross. V3's has four stages; each isolates what it matches and
leaves the rest to the next (the released tokenizer.json; report section 4.1):

    1. digits        "12345" -> "123" "45"              numbers become groups of at most three digits
    2. CJK and kana  "東京は3" -> "東京は" "3"           runs without spaces stay apart from Latin text
    3. words         "foo(bar):\\n\\n  x" -> "foo" "(bar" "):\\n\\n" " " " x"
    4. bytes         every UTF-8 byte becomes one of 256 printable characters, so no text is unknown

In stage 3 one ASCII punctuation mark sticks to the letters after it ("(bar"), and a run of punctuation takes the line
breaks that follow ("):\\n\\n"). The latter is new in V3 and the reason for `augmentation.split_joined`.

The byte tokenizer is BPE without merges.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from threading import Thread

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from deepseek_jax.data.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, Tokenizer, byte_symbols

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

SECONDS_BETWEEN_LOOKS = 0.2  # at a training that runs


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with V3's pre-tokenizer; the same documents in the same order give the same tokenizer.

    It has fewer than `vocab_size` entries if the corpus is too small for so many. Ctrl-C ends the wait at once.

    Raises:
        ValueError: `vocab_size` does not hold the bytes and the special tokens.
    """
    check_vocab_size(vocab_size)
    encoder = _untrained()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        initial_alphabet=alphabet,
        min_frequency=2,  # a pair seen once teaches nothing
        show_progress=sys.stderr.isatty(),
    )
    _interruptible(functools.partial(encoder.train_from_iterator, documents, trainer))
    return Tokenizer(encoder, BOS, EOS, PAD)


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that does not hold the bytes and the special tokens."""
    needed = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < needed:
        raise ValueError(
            f"model.vocab_size = {vocab_size} is too small for BPE: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            f" need {needed}; raise it"
        )


def _interruptible(function: Callable[[], None]) -> None:
    """Run `function` on a thread of its own: Python sees no Ctrl-C while the main thread is in the Rust side."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=run, name="train-bpe", daemon=True)  # so that an exit does not wait for it
    thread.start()
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_LOOKS)
    if failures:
        raise failures[0]


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose tokens are the 256 bytes: ids 0 to 5 are special, byte b has id 6 + b."""
    symbols = byte_symbols()
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
