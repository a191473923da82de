"""A reward model: the network with a head that gives a scalar at the last token, and what its training minimises.

Of a prompt x two answers were compared, and y_w was preferred to y_l. With r the score of prompt and answer, the
probability of that is sigmoid(r(x, y_w) - r(x, y_l)) (Bradley and Terry 1952), and

    loss = - mean over pairs of log sigmoid(r(x, y_w) - r(x, y_l))        InstructGPT, arXiv 2203.02155, eq. 1

The score is linear in the hidden state h at EOS, the last token of the answer: r = h . w. Its head w is the column of
EOS in the output head: nothing else reads the model's word on what follows an end. So a reward model has the weights of
any model here, and everything that trains, shards, saves, exports or quantises those does so with it. A leaf of its own
for w was not made: each of these would have to know it. All other columns of the head stay as they are, so weight
decay is refused.

A step's rows are pairs: row 2 i is preferred to row 2 i + 1, so that a pair is always on one device and in one
micro-batch. Scores are of no scale of their own; only their differences were learned. GRPO's advantages subtract the
mean of a group and divide by its deviation, so neither scale nor offset matters there (`posttraining.model_rewards`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepseek_jax.config import Config, Execution, Loss, Model
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.balance import RouterStats, router_stats
from deepseek_jax.model.moe import Observer
from deepseek_jax.model.transformer import Output, apply
from deepseek_jax.parallel.program import jit_on, resolve_for
from deepseek_jax.parallel.weights import in_fp32
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.conversations import with_think_tokens
from deepseek_jax.posttraining.forward import over_rows
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.network_inputs import network_inputs
from deepseek_jax.training.objective import Batch, router_metrics
from deepseek_jax.training.optimizer import Rates

PAIR = 2


class PairTerms(NamedTuple):
    """Sums over pairs, all with the weight 1."""

    loss: Array  # nats
    right: Array  # pairs whose preferred answer has the higher score
    margin: Array  # of the preferred score over the other
    square: Array  # of both scores


class PairNormalisers(NamedTuple):
    """Sizes of a step."""

    pairs: Array  # int32
    rows: Array  # that are not all padding, int32


@dataclasses.dataclass(frozen=True)
class Preferences:
    """The loss of pairs; MTP layers do not run. A `training.objective.Objective`.

    Its batch has, beside the network's inputs, `last_BS`: 1 at the last token of a row, else 0; none in padding.

    Attributes:
        model: experts.
        loss: balance losses, which are off in `preferences`.
        token: id whose column in the head is w.
    """

    model: Model
    loss: Loss
    token: int
    batch_wise = False

    @property
    def observe(self) -> Observer:
        """Report counts."""
        return functools.partial(router_stats, self.loss)

    def normalisers(self, batch: Batch) -> PairNormalisers:
        """Return this device's pairs and rows."""
        rows = (batch["last_BS"] > 0).any(-1).sum(dtype=jnp.int32)
        return PairNormalisers(rows // PAIR, rows)

    def next_tokens(self, batch: Batch) -> Array | None:
        """Return None: MTP layers do not run."""
        return None

    def scores(self, output: Output, head_DV: Array, batch: Batch) -> Array:
        """Return the score of each row, FP32 [B]."""
        with jax.named_scope("head"):
            last_BD = jnp.einsum("bsd,bs->bd", output.hidden_BSD.astype(jnp.float32), batch["last_BS"])
            return last_BD @ head_DV[:, self.token].astype(jnp.float32)

    def terms(self, output: Output, head_DV: Array, batch: Batch) -> PairTerms:
        """Sum over the pairs of one device and micro-batch."""
        return pair_terms(self.scores(output, head_DV, batch), batch["last_BS"])

    def total(self, terms: PairTerms, router: RouterStats, norms: PairNormalisers, rates: Rates) -> Array:
        """Return the loss."""
        return terms.loss / jnp.maximum(norms.pairs, 1)

    def metrics(self, terms: PairTerms, router: RouterStats, norms: PairNormalisers) -> dict[str, Array]:
        """Return means over pairs."""
        mean = PairTerms(*(x / jnp.maximum(norms.pairs, 1) for x in terms))
        values = {"loss": mean.loss, "accuracy": mean.right, "margin": mean.margin, "pairs": norms.pairs}
        return values | {"score_rms": jnp.sqrt(mean.square / PAIR)} | router_metrics(router, norms.rows)


def preferences(model: Model, loss: Loss, token: int) -> Preferences:
    """Return the objective, with the balance losses of pre-training off; `token` is EOS."""
    off = {"sequence_balance_weight": 0.0, "batch_balance_weight": 0.0, "mtp_weight": ()}
    return Preferences(model, dataclasses.replace(loss, **off), token)


def pair_terms(score_B: Array, last_BS: Array) -> PairTerms:
    """Return the sums over pairs of rows; a pair of padding adds nothing.

    Raises:
        ValueError: a device and micro-batch has an odd number of rows.
    """
    if score_B.shape[0] % PAIR:
        raise ValueError(
            f"a device has {score_B.shape[0]} rows of a micro-batch, and pairs take two; make training.micro_batch_size"
            " twice a multiple of the devices that share the rows"
        )
    better_I, worse_I = score_B.reshape(-1, PAIR).T
    real_I = (last_BS > 0).any(-1).reshape(-1, PAIR)[:, 0].astype(jnp.float32)
    margin_I = better_I - worse_I
    values = jax.nn.softplus(-margin_I), margin_I > 0, margin_I, better_I**2 + worse_I**2
    return PairTerms(*((x_I * real_I).sum() for x_I in values))


def encode_answer(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], text: str
) -> list[int]:
    """Return the ids of a prompt and an answer that ends with EOS, as in training so in scoring."""
    return [*template.encode(tokenizer, messages), *with_think_tokens(tokenizer, text), tokenizer.eos]


def answers_batch(answers: Sequence[Sequence[int]], length: int, pad: int) -> dict[str, np.ndarray]:
    """Return a batch of `Preferences`, one answer a row; an empty one is a row of padding.

    Raises:
        ValueError: an answer does not fit.
    """
    shape = len(answers), length
    tokens_BS, segment_ids_BS, last_BS = np.full(shape, pad, np.int32), np.zeros(shape, np.int32), np.zeros(shape)
    for i, ids in enumerate(answers):
        if len(ids) > length:
            raise ValueError(
                f"a prompt and its answer have {len(ids)} tokens, and a row of the reward model takes {length}; raise"
                " data.sequence_length of its run, or shorten the answers"
            )
        tokens_BS[i, : len(ids)], segment_ids_BS[i, : len(ids)] = ids, 1
        if ids:
            last_BS[i, len(ids) - 1] = 1.0
    positions_BS = np.tile(np.arange(length, dtype=np.int32), (len(answers), 1))
    arrays = {"tokens_BS": tokens_BS, "positions_BS": positions_BS, "segment_ids_BS": segment_ids_BS}
    return arrays | {"last_BS": last_BS.astype(np.float32)}


def score_program(config: Config, objective: Preferences, mesh: jax.sharding.Mesh) -> Callable[[Weights, Batch], Any]:
    """Return `scores`, jitted for a mesh. Call it under `jax.set_mesh(mesh)`."""
    execution = resolve_for(config, mesh).execution
    return jit_on(scores, execution, mesh, config.model, execution, objective)


def scores(model: Model, execution: Execution, objective: Preferences, weights: Weights, batch: Batch) -> Array:
    """Return the score of each row, FP32 [B]."""

    def forward(weights, batch, load):
        inputs = network_inputs(model, execution, objective, batch)
        output = apply(model, execution, weights, inputs, load, objective.observe, 1)
        head_DV = in_fp32(load({"head_DV": weights.params["head_DV"]})["head_DV"])
        return objective.scores(output, head_DV, batch)

    return over_rows(model, execution, forward, weights, batch)


def score_answers(
    program: Callable[[Weights, Batch], Any],
    weights: Weights,
    answers: Sequence[Sequence[int]],
    sizes: tuple[int, int],
    pad: int,
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """Return the scores of any number of answers, in batches of `sizes`: rows, and their length."""
    num_rows, length = sizes
    parts = []
    for begin in range(0, len(answers), num_rows):
        rows = [*answers[begin : begin + num_rows]]
        rows += [[]] * (num_rows - len(rows))
        parts.append(program(weights, place_batch(answers_batch(rows, length, pad), mesh)))
    return np.concatenate(jax.device_get(parts))[: len(answers)]
