"""What is packed: ids as they are to be trained on, and how much each counts.

A document of the corpus becomes an example when `augmentation` has put BOS before it and EOS after it; it has no
weights, so every token counts. Supervised fine-tuning makes examples of its own from conversations: complete too, since
a chat template writes BOS and EOS itself, with weight 0 on what the model should read but not learn to write.

A weight belongs to its token *as a target*. Position i of a batch predicts token i + 1, so `loss_weights_BS[i]` is the
weight of the token that is the target at i. A prompt p1 p2 and its answer a1 a2 EOS:

    ids                 p1  p2  a1  a2  EOS
    weights              0   0   1   1   1

    position             0   1   2   3
    tokens_BS           p1  p2  a1  a2
    targets_BS          p2  a1  a2  EOS
    loss_weights_BS      0   1   1   1            p2 is trained to be followed by a1, the answer to end with EOS

The first token of a row is a target nowhere, so its weight does not count.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WEIGHT_DTYPES = (np.dtype(bool), np.dtype(np.uint8), np.dtype(np.float32))


class Example(NamedTuple):
    """One document to train on, BOS and EOS included where it should have them."""

    ids: np.ndarray  # integers
    weights: np.ndarray | None = None  # bool, uint8 or float32: of each id as a target; None means all are 1


def check_examples(examples: Sequence[Example], vocab_size: int) -> tuple[int, str]:
    """Read all examples once, and return their number of tokens and the SHA-256 of their ids and weights.

    Raises:
        ValueError: an example is empty, its ids lie beyond the vocabulary, its weights do not fit, or no token has any.
    """
    num_tokens, has_weight, digest = 0, False, hashlib.sha256()
    for i in range(len(examples)):
        ids, weights = _checked(examples[i], f"examples[{i}]", vocab_size)
        num_tokens += len(ids)
        has_weight = has_weight or bool(weights.any())
        digest.update(f"{len(ids)} ".encode() + ids.astype("<i4").tobytes() + weights.astype("<f4").tobytes())
    if not has_weight:
        raise ValueError(f"no token of {len(examples)} examples has weight; give 1 to those that should be learned")
    return num_tokens, digest.hexdigest()


def _checked(example: Example, name: str, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and the weights of an example that is sound."""
    if not isinstance(example, Example):
        raise ValueError(f"{name} is a {type(example).__name__}; make it an Example(ids, weights)")
    ids = np.asarray(example.ids)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} has ids of shape {ids.shape} and type {ids.dtype}; give integers, at least one")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(
            f"{name} has token id {wrong} and the vocabulary ends at {vocab_size - 1}; encode it with the run's"
            " tokenizer"
        )
    if example.weights is None:
        return ids, np.ones(len(ids), np.uint8)
    weights = np.asarray(example.weights)
    if weights.shape != ids.shape:
        raise ValueError(f"{name} has weights of shape {weights.shape} and ids of shape {ids.shape}; give each id one")
    if weights.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} has weights of type {weights.dtype}; make them bool, uint8 or float32")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"{name} has weights from {weights.min()} to {weights.max()}; make all finite and at least 0")
    return ids, weights
