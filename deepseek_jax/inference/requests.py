"""What a request asks for beside its prompt, and how the requests of a batch become its rows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.inference.sampling import LARGEST_PENALTY, MOST_LOGPROBS, Bias, Rows

NOWHERE = 2**31 - 1  # an id beyond every vocabulary
FEWEST_BIASES = 8  # rows have this many pairs, or a power of two more, so that few programs are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a request may have of its own.

    Attributes:
        seed: of its draws, 64 bits; the request then gives the same text wherever it stands, up to rounding. None takes
            the seed of the batch and the request's number.
        logit_bias: numbers added to the logits of ids, as OpenAI has it: -100 rules an id out.
        num_logprobs: log-probabilities come with each token: its own, and those of so many most probable ones.
    """

    seed: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    num_logprobs: int | None = None

    def __post_init__(self):
        """Refuse values outside their range, NaN included."""
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed = {self.seed} does not fit into 64 bits")
        for token, value in self.logit_bias.items():
            if token < 0 or not -LARGEST_PENALTY <= value <= LARGEST_PENALTY:
                raise ValueError(
                    f"logit_bias = {value} for id {token}: an id is at least 0, and a bias at most"
                    f" {LARGEST_PENALTY:g} away from 0; -100 rules an id out"
                )
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs = {self.num_logprobs} must be from 0 to {MOST_LOGPROBS}")


PLAIN = Request()


def check_bias(request: Request, vocab_size: int) -> None:
    """Refuse a bias of an id that no token has."""
    beyond = [token for token in request.logit_bias if token >= vocab_size]
    if beyond:
        raise ValueError(f"logit_bias has id {beyond[0]}, and the last token is {vocab_size - 1}")


def make_rows(requests: Sequence[Request], seed: int, batch_size: int, first_row: int = 0) -> Rows:
    """Return what choices need of the requests in a batch's rows; `first_row` is the number of the first request.

    A request's draws depend on its own seed, or on `seed` and its number. Request 0 without a seed and any request with
    `seed` as its own draw the same.
    """
    padded = [*requests, *[PLAIN] * (batch_size - len(requests))]
    own = [(seed, first_row + i) if request.seed is None else (request.seed, 0) for i, request in enumerate(padded)]
    return Rows(row_keys(*zip(*own, strict=True)), _bias(padded))


def row_keys(seeds: Sequence[int], numbers: Sequence[int]) -> jax.Array:
    """Return a key for the draws of each row; it depends on the row's seed of 64 bits and its number only."""
    words = [[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds]
    keys_B = jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys_B, np.array(numbers, np.uint32))


def _bias(requests: Sequence[Request]) -> Bias | None:
    most = max(len(request.logit_bias) for request in requests)
    if not most:
        return None
    width = max(FEWEST_BIASES, 2 ** math.ceil(math.log2(most)))
    ids_BJ = np.full((len(requests), width), NOWHERE, np.int32)
    values_BJ = np.zeros((len(requests), width), np.float32)
    for ids, values, request in zip(ids_BJ, values_BJ, requests, strict=True):
        ids[: len(request.logit_bias)] = list(request.logit_bias)
        values[: len(request.logit_bias)] = list(request.logit_bias.values())
    return Bias(jnp.asarray(ids_BJ), jnp.asarray(values_BJ))
