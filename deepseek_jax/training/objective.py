"""What a step minimises, as a value: `Objective`, and `Pretraining`, the report's.

The step differentiates, accumulates and reduces what an objective says. Its parts, in the order in which a step uses
them, and what each sees:

    normalisers   a device's whole batch        sizes to divide by; summed over devices before the first micro-batch
    next_tokens   a micro-batch                 what MTP layers embed
    terms         a micro-batch and its output  sums over tokens, which are added over micro-batches and devices
                                                (rows are whole, the output is of this device's tokens of them)
    total         terms, normalisers, rates     the scalar that is differentiated; linear in the terms
    metrics       terms, normalisers            what a step reports

For the gradient, `total` gets the terms of one device and micro-batch; `metrics` gets the global terms. Of what routers
report, the choices that the batch-wise balance loss counts are those of the whole batch in both. Both divide by
global normalisers, never by a local count, so a device or micro-batch with few tokens does not weigh too much.

An objective is a static argument of a compiled program: a frozen dataclass of values. Further arrays that it needs
(advantages, log-probabilities of a reference) travel in the batch, one row per sequence.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.config import Config, Loss, Model
from deepseek_jax.model.balance import RouterStats, batch_balance, max_violation, router_stats
from deepseek_jax.model.head import cross_entropy
from deepseek_jax.model.moe import Observer
from deepseek_jax.model.transformer import Output
from deepseek_jax.parallel import context
from deepseek_jax.training.optimizer import Rates

Batch = dict[str, Array]


class Detached(NamedTuple):
    """What MTP layers embed, when they alone are to learn from their loss: no gradient of it reaches the main model."""

    tokens_BS: Array


class Objective(Protocol):
    """What a step minimises; see the module. `router` is what the routers reported; its leading dim is layers."""

    @property
    def observe(self) -> Observer:
        """What each router reports: `RouterStats`. Its counts update the biases."""

    @property
    def batch_wise(self) -> bool:
        """Whether `total` reads `router.chosen_E`: the choices of the whole batch, not of a device and micro-batch.

        Of several micro-batches each needs them before its gradient, so the step then makes a forward pass more.
        """

    def normalisers(self, batch: Batch) -> Any:
        """Return one device's part of the sizes by which sums are divided."""

    def next_tokens(self, batch: Batch) -> Array | Detached | None:
        """Return the token after each position [B, S], or None: MTP layers do not run."""

    def terms(self, output: Output, head_DV: Array, batch: Batch) -> Any:
        """Return sums over the tokens of one device and micro-batch; `head_DV` may be FP32 where the rest is BF16."""

    def total(self, terms: Any, router: RouterStats, norms: Any, rates: Rates) -> Array:
        """Return the scalar to differentiate."""

    def metrics(self, terms: Any, router: RouterStats, norms: Any) -> dict[str, Array]:
        """Return what to report: scalars, and arrays over layers. A step whose "loss" is not finite is skipped."""


class Terms(NamedTuple):
    """Sums over tokens, in nats."""

    loss: Array
    z: Array
    mtp: Array  # [MTP layers]


class Normalisers(NamedTuple):
    """Sizes of a batch."""

    weight: Array  # sum of the loss weights, in tokens
    tokens: Array  # positions that are not padding, int32
    sequences: Array  # rows that are not all padding, int32


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """DeepSeek-V3's objective: cross entropy, MTP (eq. 24, 25) and the balance losses (eq. 17).

    Attributes:
        loss: weights of the terms; the weight of MTP comes with the rates of a step.
        model: MTP depths, experts.
        chunk: tokens whose logits exist at once.
        mtp: "joint"; "detached": MTP layers alone learn from their loss; "off": they do not run.
    """

    loss: Loss
    model: Model
    chunk: int
    mtp: str = "joint"

    @property
    def observe(self) -> Observer:
        """Report counts, and the balance losses that are on."""
        return functools.partial(router_stats, self.loss)

    @property
    def batch_wise(self) -> bool:
        """Whether the batch-wise balance loss is on, and there are routers."""
        return bool(self.loss.batch_balance_weight and self.model.num_moe_layers)

    def normalisers(self, batch: Batch) -> Normalisers:
        """Return this device's weight, tokens and sequences."""
        valid_BS = batch["segment_ids_BS"] > 0
        sequences = valid_BS.any(-1).sum(dtype=jnp.int32)
        return Normalisers(batch["loss_weights_BS"].sum(), valid_BS.sum(dtype=jnp.int32), sequences)

    @property
    def runs_mtp(self) -> bool:
        """Whether there are MTP layers that run."""
        return bool(self.model.num_mtp_layers) and self.mtp != "off"

    def next_tokens(self, batch: Batch) -> Array | Detached | None:
        """Return the targets: unlike the tokens, they also tell what follows the last position."""
        if not self.runs_mtp:
            return None
        return Detached(batch["targets_BS"]) if self.mtp == "detached" else batch["targets_BS"]

    def terms(self, output: Output, head_DV: Array, batch: Batch) -> Terms:
        """Sum the losses over a device's tokens."""

        mtp_head_DV = lax.stop_gradient(head_DV) if self.mtp == "detached" else head_DV

        def head_loss(hidden_BSD, head_DV, targets_BS, weights_BS, z_weight):
            hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
            targets_T, weights_T = (context.local(x_BS).reshape(-1) for x_BS in (targets_BS, weights_BS))
            return cross_entropy(hidden_TD, head_DV, targets_T, weights_T, self.chunk, z_weight)

        with jax.named_scope("head"):
            loss, z = head_loss(
                output.hidden_BSD, head_DV, batch["targets_BS"], batch["loss_weights_BS"], self.loss.z_loss_weight
            )
            mtp = [
                head_loss(hidden_BSD, mtp_head_DV, *mtp_targets(batch, depth), 0.0)[0]
                for depth, hidden_BSD in enumerate(output.mtp_hidden, start=1)
            ]
        return Terms(loss, z, jnp.stack(mtp) if mtp else jnp.zeros_like(loss, shape=(0,)))

    def total(self, terms: Terms, router: RouterStats, norms: Normalisers, rates: Rates) -> Array:
        """Add the terms; the MTP loss is divided by the main loss's weight, too."""
        weight = jnp.maximum(norms.weight, 1e-9)
        total = (terms.loss + terms.z) / weight
        if self.runs_mtp:
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
        """Return the weighted balance losses, summed over layers."""
        total = self.loss.sequence_balance_weight * router.sequence_balance.sum() / jnp.maximum(norms.sequences, 1)
        if self.batch_wise:
            balance = batch_balance(self.model, router.chosen_E, router.share_E, norms.tokens)
            total += self.loss.batch_balance_weight * balance
        return total


def pretraining(config: Config) -> Pretraining:
    """Return the objective of pre-training, without the schedule of the MTP weight, which comes with the rates."""
    loss = dataclasses.replace(config.loss, mtp_weight=())
    return Pretraining(loss, config.model, config.execution.loss_chunk)


def router_metrics(router: RouterStats, sequences: Array) -> dict[str, Array]:
    """Return every router's load of its experts, and how uneven it is."""
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
        weight     w2   w3   w4   w5   0       0 also if the position `depth` further is of another document

    The ids are shifted, never the hidden states. The loss is divided by the main loss's weight (5 here), not by the
    number of terms.

    Raises:
        ValueError: the sequence is not longer than `depth`.
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
