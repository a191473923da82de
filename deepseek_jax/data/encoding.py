"""Texts to ids, where a text that the tokenizer does not take is one item's error and not the end of the run.

The Rust side of `tokenizers` raises plain Exception, and where it panics an exception that is no Exception at all: ten
million spaces exceed what its regular expressions try.
"""

from array import array
from collections.abc import Sequence

import tokenizers

Ids = list["array | EncodingError"]  # one for each text


class EncodingError(ValueError):
    """A text that the tokenizer does not take."""


# Characters from which a text is encoded as a batch of one: other threads run meanwhile, which a long text would hold
# up for seconds, and places in the text, which take most of the memory, are not kept. For short ones a batch is slower.
LONG = 20_000


def encode_text(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return the ids of `text`, without what the tokenizer adds around it.

    Raises:
        EncodingError: the tokenizer does not take it.
    """
    try:
        if len(text) >= LONG:
            return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return encoder.encode(text, add_special_tokens=False).ids
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic
        raise EncodingError(_cause(text, error)) from error


def encode_texts(encoder: tokenizers.Tokenizer, texts: Sequence[str]) -> Ids:
    """Return the ids of each text, or why it has none. The texts are encoded on all cores."""
    try:
        encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("I", encoding.ids) for encoding in encodings]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if len(texts) == 1:
            return [EncodingError(_cause(texts[0], error))]
    return [answer for text in texts for answer in encode_texts(encoder, [text])]


def _cause(text: str, error: BaseException) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as half:
        return f"it has half of a character ({half.reason} at {half.start})"
    return f"the tokenizer does not take it: {error}"
