"""Fill-in-the-middle and boundary splitting: changes that a document gets anew in every epoch.

Both are those of DeepSeek-V3 (arXiv 2412.19437, section 4.1). Fill-in-the-middle (FIM) rearranges whole documents
before packing, in the order prefix, suffix, middle:

    def f(x):  return x + 1        cut at two characters drawn uniformly, here around "return"
    <fim_begin> def f(x):  <fim_hole>  x + 1 <fim_end> return       (then EOS, like any document)

Each part is tokenised alone, as when an editor asks for a completion.

Boundary splitting. A token of V3 may join punctuation and the line breaks after it, like "):\\n". A prompt that ends
in "):" then ends inside a token that the model always saw whole, and its continuation is off (token boundary bias). So
some of these tokens are replaced by the tokens of "):" and of "\\n". The report does not say how many, nor where it
cuts; we cut between punctuation and line breaks.

Only documents of the corpus pass here. Examples with weights (`examples`) are trained on as they are: the parts of a
FIM document are tokenised anew, so there would be no token for a weight to follow, and a prompt would come after its
answer.
"""

import unicodedata

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer


class Augmentation:
    """Turns the ids of a document into those to train on: BOS, the document (perhaps changed), EOS."""

    def __init__(self, tokenizer: Tokenizer, fim_rate: float, split_rate: float):
        """Take the probabilities of FIM, per document, and of splitting, per joined token.

        Raises:
            ValueError: `fim_rate` is not 0 and the tokenizer lacks V3's FIM tokens.
        """
        if fim_rate and None in (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end):
            raise ValueError(
                f"data.fim_rate = {fim_rate} needs a tokenizer with V3's FIM tokens; set data.fim_rate = 0 for this one"
            )
        self._tokenizer = tokenizer
        self._fim_rate = fim_rate
        self._split_rate = split_rate
        self._parts_VK, self._num_parts_V = joined_tokens(tokenizer)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return int32 ids with BOS and EOS; they depend on `ids` and the state of `rng` alone."""
        # FIM decodes, which would lose special tokens, as a chat given as ids has them.
        is_text = self._tokenizer.num_bytes_V[ids].all()
        if rng.random() < self._fim_rate and is_text:
            ids = fill_in_middle(ids, self._tokenizer, rng)
        if self._split_rate:
            ids = split_joined(ids, self._parts_VK, self._num_parts_V, self._split_rate, rng)
        return np.concatenate([[self._tokenizer.bos], ids, [self._tokenizer.eos]]).astype(np.int32)


def fill_in_middle(ids: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """Return `<fim_begin> prefix <fim_hole> suffix <fim_end> middle` of a document cut at two random characters."""
    text = tokenizer.decode(ids)
    start, end = np.sort(rng.integers(0, len(text) + 1, size=2))
    prefix, middle, suffix = (tokenizer.encode(part) for part in (text[:start], text[start:end], text[end:]))
    return np.array([tokenizer.fim_begin, *prefix, tokenizer.fim_hole, *suffix, tokenizer.fim_end, *middle], np.int32)


def split_joined(
    ids: np.ndarray, parts_VK: np.ndarray, num_parts_V: np.ndarray, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Replace each joined token by its parts with probability `rate`; the tables come from `joined_tokens`."""
    chosen = (num_parts_V[ids] > 1) & (rng.random(len(ids)) < rate)
    lengths = np.where(chosen, num_parts_V[ids], 1)
    starts = np.cumsum(lengths) - lengths
    result = np.empty(lengths.sum(), np.int32)
    result[starts] = np.where(chosen, parts_VK[ids, 0], ids)
    for k in range(1, parts_VK.shape[1]):
        longer = lengths > k
        result[starts[longer] + k] = parts_VK[ids[longer], k]
    return result


def joined_tokens(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts of every token that joins punctuation and line breaks.

    Returns:
        parts_VK: row v holds the tokens of v's punctuation, then of its line breaks; K is the largest number of parts.
        num_parts_V: how many entries of row v are used; 0 for a token that is not joined.
    """
    parts = {}
    for token_id, piece in enumerate(tokenizer.token_bytes):
        text = piece.decode("utf-8", "ignore")
        punctuation = text.rstrip("\r\n")
        if punctuation and punctuation != text and unicodedata.category(punctuation[-1])[0] in "PS":
            parts[token_id] = tokenizer.encode(punctuation) + tokenizer.encode(text[len(punctuation) :])
    parts_VK = np.zeros((tokenizer.vocab_size, max(map(len, parts.values()), default=1)), np.int32)
    num_parts_V = np.zeros(tokenizer.vocab_size, np.int64)
    for token_id, row in parts.items():
        parts_VK[token_id, : len(row)] = row
        num_parts_V[token_id] = len(row)
    return parts_VK, num_parts_V
