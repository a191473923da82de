"""What a step minimises, as a value: `Objective`, and `Pretraining`, the report's.

The step differentiates, accumulates and reduces; an objective says what. Its parts, in the order in which a step uses
them, with what they see:

    normalisers   a device's whole batch        sizes to divide by, summed over devices before the first micro-batch
    next_tokens   a micro-batch                 what MTP layers embed
    terms         a micro-batch and its output  sums over tokens: micro-batches and devices only ever add them
    total         terms, normalisers            the scalar that is differentiated; linear in the terms
    metrics       terms, normalisers            what a step reports

`total` is called with one device's part of the terms for the gradient, `metrics` with the global terms. Both divide by
global normalisers, never by a local count, so a device or micro-batch with few tokens weighs no more than it should.

An objective is a static argument of a compiled program: a frozen dataclass of values. Arrays that it needs besides
(advantages, log-probabilities of a reference) travel in the batch, one row per sequence.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax.config import Config, Loss
from deepseek_jax.model.balance import RouterStats, max_violation, router_stats
from deepseek_jax.model.head import cross_entropy
from deepseek_jax.model.moe import Observer
from deepseek_jax.model.transformer import Output
from deepseek_jax.training.optimizer import Rates

Batch = dict[str, Array]


class Objective(Protocol):
    """See the module. `router` is what the routers reported, which balance losses need; leading dim: layers."""

    @property
    def observe(self) -> Observer:
        """What each router reports: `RouterStats`, from whose counts the biases are updated."""

    def normalisers(self, batch: Batch) -> Any:
        """Return a device's part of the sizes that sums are divided by."""

    def next_tokens(self, batch: Batch) -> Array | None:
        """Return the token after each position [B, S], or None to leave MTP layers out."""

    def terms(self, output: Output, head_DV: Array, batch: Batch) -> Any:
        """Return sums over a device's tokens."""

    def total(self, terms: Any, router: RouterStats, norms: Any, rates: Rates) -> Array:
        """Return the scalar to differentiate."""

    def metrics(self, terms: Any, router: RouterStats, norms: Any) -> dict[str, Array]:
        """Return what to report: scalars and arrays over layers; "loss" is checked for being finite."""


class Terms(NamedTuple):
    """Sums over tokens, in nats."""

    loss: Array
    z: Array
    mtp: Array  # [MTP layers]


class Normalisers(NamedTuple):
    """Sizes of a batch."""

    weight: Array  # sum of the loss weights
    tokens: Array  # positions that are not padding, int32
    sequences: Array  # rows that are not all padding, int32


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """DeepSeek-V3's objective: cross entropy, MTP (eq. 24, 25) and the balance losses (eq. 17).

    Attributes:
        loss: weights of the terms; that of MTP comes with the rates of a step.
        num_mtp_layers: of the model.
        chunk: tokens whose logits exist at once.
    """

    loss: Loss
    num_mtp_layers: int
    chunk: int

    @property
    def observe(self) -> Observer:
        """Counts, and the balance losses that are on."""
        return functools.partial(router_stats, self.loss)

    def normalisers(self, batch: Batch) -> Normalisers:
        """Return weights, tokens and sequences."""
        valid_BS = batch["segment_ids_BS"] > 0
        sequences = valid_BS.any(-1).sum(dtype=jnp.int32)
        return Normalisers(batch["loss_weights_BS"].sum(), valid_BS.sum(dtype=jnp.int32), sequences)

    def next_tokens(self, batch: Batch) -> Array | None:
        """Return the targets: known for one position more than the tokens are."""
        return batch["targets_BS"] if self.num_mtp_layers else None

    def terms(self, output: Output, head_DV: Array, batch: Batch) -> Terms:
        """Sum the losses over a device's tokens."""

        def head_loss(hidden_BSD, targets_BS, weights_BS, z_weight):
            hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
            return cross_entropy(
                hidden_TD, head_DV, targets_BS.reshape(-1), weights_BS.reshape(-1), self.chunk, z_weight
            )

        with jax.named_scope("head"):
            loss, z = head_loss(
                output.hidden_BSD, batch["targets_BS"], batch["loss_weights_BS"], self.loss.z_loss_weight
            )
            mtp = [
                head_loss(hidden_BSD, *mtp_targets(batch, depth), 0.0)[0]
                for depth, hidden_BSD in enumerate(output.mtp_hidden, start=1)
            ]
        return Terms(loss, z, jnp.stack(mtp) if mtp else jnp.zeros_like(loss, shape=(0,)))

    def total(self, terms: Terms, router: RouterStats, norms: Normalisers, rates: Rates) -> Array:
        """Add the terms; MTP is divided by the main loss's tokens."""
        weight = jnp.maximum(norms.weight, 1e-9)
        total = (terms.loss + terms.z) / weight
        if self.num_mtp_layers:
            total += rates.mtp_weight * terms.mtp.mean() / weight
        return total + self._balance(router, norms)

    def metrics(self, terms: Terms, router: RouterStats, norms: Normalisers) -> dict[str, Array]:
        """Return losses in nats per token, and the routers' loads."""
        weight = jnp.maximum(norms.weight, 1e-9)
        return {
            "loss": terms.loss / weight,
            "z_loss": terms.z / weight,
            "mtp_loss": terms.mtp / weight,
            "balance_loss": self._balance(router, norms),
            "tokens": norms.tokens,
        } | router_metrics(router, norms.sequences)

    def _balance(self, router: RouterStats, norms: Normalisers) -> Array:
        """The balance losses, summed over layers."""
        sequence = self.loss.sequence_balance_weight * router.sequence_balance.sum() / jnp.maximum(norms.sequences, 1)
        return sequence + self.loss.batch_balance_weight * router.batch_balance.sum() / jnp.maximum(norms.tokens, 1)


def pretraining(config: Config) -> Pretraining:
    """Return the objective of pre-training; it does not depend on the schedule of MTP's weight."""
    loss = dataclasses.replace(config.loss, mtp_weight=())
    return Pretraining(loss, config.model.num_mtp_layers, config.execution.loss_chunk)


def router_metrics(router: RouterStats, sequences: Array) -> dict[str, Array]:
    """Return the load of every router, and how uneven it is."""
    counts_LE = router.counts_E
    return {
        "counts_LE": counts_LE,
        "max_vio_L": max_violation(counts_LE),
        "max_vio_sequence_L": router.violation / jnp.maximum(sequences, 1),
        "dead_experts": jnp.sum(counts_LE == 0, dtype=jnp.int32),
    }


def mtp_targets(batch: Batch, depth: int) -> tuple[Array, Array]:
    """Return (targets_BS, weights_BS) of prediction depth `depth` = 1, 2, ... (DeepSeek-V3, eq. 21 to 25).

    Position i combines its hidden state with the embedding of token i + depth and predicts token i + depth + 1. For
    five tokens t1 .. t5 with t6 the target of the last, at depth 1:

        position   1    2    3    4    5
        token      t2   t3   t4   t5   t6      embedded and merged
        target     t3   t4   t5   t6   -       predicted
        weight     w2   w3   w4   w5   0       0 also where the position `depth` further belongs to another document

    The ids are shifted, never the hidden states. The loss is divided by the main loss's weight (5 here), not by the
    number of terms.

    Raises:
        ValueError: a sequence has no such position.
    """
    length = batch["tokens_BS"].shape[1]
    if depth >= length:
        raise ValueError(
            f"a sequence of {length} tokens has no target at MTP depth {depth}; lengthen it or set fewer MTP layers"
        )

    def shift(x_BS):
        return jnp.pad(x_BS[:, depth:], ((0, 0), (0, depth)))

    same_document = shift(batch["segment_ids_BS"]) == batch["segment_ids_BS"]
    return shift(batch["targets_BS"]), shift(batch["loss_weights_BS"]) * same_document
