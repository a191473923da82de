"""What GRPO minimises: a policy gradient with clipped ratios, as orthogonal choices.

Of each prompt q a group of outputs o_1 .. o_G was sampled and got rewards, hence advantages A_i
(`posttraining.advantages`). With token t of output i, pi the policy, old the policy that was sampled (scored by the
trainer), ref a reference, sampler what the sampler itself said:

    d_t = log pi_t - log old_t                                            log ratio of a token
    rho_t = exp(d_t) | exp(mean_t d_t) | exp(sum_t d_t)                   `ratio`
    g_t = min(rho_t A, clip(rho_t, 1 - low, 1 + high) A)                  `clip` = "ratio"
          and at least c A where A < 0                                    `dual_clip` = c
          or stop(clip(rho_t, 1 - low, 1 + high)) A log pi_t              `clip` = "weight"
    w_t = min(old_t / sampler_t, cap), a constant                         `tis_cap`
    k_t = k1, k2 or k3 of r = log ref_t - log pi_t                        `kl`: -r, r^2 / 2, exp(r) - r - 1

    loss = - sum_i sum_t c_it (w_t g_t - beta k_t)                        `kl_weight` = beta
    c_it = 1 / (N |o_i|)     mean of each output, then over outputs       `aggregation` = "sequence"
           1 / sum_i |o_i|   mean over all tokens of the step             "token"
           1 / (N L)         sums over a constant length                  "constant", `constant_length` = L

N and sum |o_i| are those of the whole step, over all devices and micro-batches; outputs without a loss weight
(overlong and masked, or of a group without signal and left out) do not count in them. So the update does not depend on
the split of a batch, on padding or on the order of its rows. A row holds one output; its prompt has no loss weight.

The published variants are rows of `VARIANTS`:

    grpo       DeepSeekMath, arXiv 2402.03300, eq. 3 and 4: one epsilon, k3 in the loss, mean per output
    v3         DeepSeek-V3, arXiv 2412.19437, eq. 26 and 27 as printed: ratio and KL of whole outputs. Ratios of long
               outputs leave every interval, so this is for short ones
    dapo       arXiv 2503.14476, eq. 8: more room above than below, mean over tokens, no KL, groups without signal left
               out, soft punishment of overlong outputs. The paper's mean is over the tokens of a group, and that of its
               code, and ours, over those of the step
    dr_grpo    arXiv 2503.20783: no division by length or by the standard deviation
    gspo       arXiv 2507.18071, eq. 5 to 7: the ratio is the geometric mean over the output
    gspo_token its eq. 13 to 15: equal values, gradients of each token with that token's own advantage
    cispo      arXiv 2506.13585, eq. 4 and 5: weights are clipped, no token loses its gradient

Beyond `LARGEST_LOG_RATIO` exp goes on as its tangent there: exp itself would overflow, and its gradient be 0 times
infinity where a clip has ended it. Where none has (k3, and A < 0 without `dual_clip`) the gradient keeps its sign. Sums
over whole outputs (`v3`) do get there.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.config import Loss, Model
from deepseek_jax.model.balance import RouterStats, router_stats
from deepseek_jax.model.head import token_logprobs
from deepseek_jax.model.moe import Observer
from deepseek_jax.model.transformer import Output
from deepseek_jax.parallel import context
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.posttraining.choices import Choices
from deepseek_jax.training.objective import Batch, router_metrics
from deepseek_jax.training.optimizer import Rates

LARGEST_LOG_RATIO = 20.0


class PolicyTerms(NamedTuple):
    """Sums over completion tokens; the first two are weighted for the loss, the others plain."""

    gain: Array
    kl: Array
    tokens: Array
    token_kl: Array
    surprise: Array  # of -log pi
    old_kl: Array  # of log old - log pi
    ratio: Array
    ratio_squared: Array
    clipped_low: Array
    clipped_high: Array
    tis_weight: Array
    tis_capped: Array


class PolicyNormalisers(NamedTuple):
    """Sizes of a step."""

    tokens: Array  # that carry loss, FP32
    outputs: Array  # with at least one of them, int32
    rows: Array  # that are not all padding, int32


@dataclasses.dataclass(frozen=True)
class Policy:
    """GRPO's objective; MTP layers do not run. A `training.objective.Objective`.

    Its batch has, beside the network's inputs, `targets_BS`, `loss_weights_BS` (1 on targets that the policy drew, else
    0), FP32 `advantages_B` and `old_logprobs_BS`, and where the choices read them `reference_logprobs_BS` and
    `sampler_logprobs_BS`. Log-probabilities belong to the target at their place. It may have `routes_BSLK`, which the
    MoE layers then replay, `kept_BSW`, among which targets were drawn (`model.head`), and `exact_logprobs_BS`, whose
    values then stand for those of the forward pass (`valued`).

    Attributes:
        choices: see the module.
        model: experts.
        loss: balance losses, which are off in `policy`.
        chunk: tokens whose logits exist at once.
        temperature: of the policy: logits are divided by it.
    """

    choices: Choices
    model: Model
    loss: Loss
    chunk: int
    temperature: float = 1.0
    batch_wise = False

    @property
    def observe(self) -> Observer:
        """Report counts."""
        return functools.partial(router_stats, self.loss)

    def normalisers(self, batch: Batch) -> PolicyNormalisers:
        """Return this device's tokens, outputs and rows."""
        weights_BS = batch["loss_weights_BS"]
        outputs = (weights_BS > 0).any(-1).sum(dtype=jnp.int32)
        return PolicyNormalisers(weights_BS.sum(), outputs, (batch["segment_ids_BS"] > 0).any(-1).sum(dtype=jnp.int32))

    def next_tokens(self, batch: Batch) -> Array | None:
        """Return None: MTP layers do not run."""
        return None

    def logprobs(self, output: Output, head_DV: Array, batch: Batch) -> Array:
        """Return FP32 log-probabilities of this device's targets as they are drawn, in nats.

        That is at the policy's temperature, and among the ids of `kept_BSW` (`model.head`) where the batch has them.
        """
        ids = batch["targets_BS"], batch.get("kept_BSW")
        return policy_logprobs(output.hidden_BSD, head_DV, *ids, self.chunk, self.temperature)

    def terms(self, output: Output, head_DV: Array, batch: Batch) -> PolicyTerms:
        """Sum over the tokens of one device and micro-batch."""
        with jax.named_scope("head"):
            logprob_BS = self.logprobs(output, head_DV, batch)
        if "exact_logprobs_BS" in batch:
            logprob_BS = valued(logprob_BS, vary(context.local(batch["exact_logprobs_BS"]), logprob_BS))
        return policy_terms(self.choices, logprob_BS, batch)

    def total(self, terms: PolicyTerms, router: RouterStats, norms: PolicyNormalisers, rates: Rates) -> Array:
        """Return the loss."""
        return policy_loss(self.choices, terms, norms)

    def metrics(self, terms: PolicyTerms, router: RouterStats, norms: PolicyNormalisers) -> dict[str, Array]:
        """Return the loss, and means over completion tokens, in nats."""
        mean = PolicyTerms(*(x / jnp.maximum(terms.tokens, 1.0) for x in terms))
        return {
            "loss": policy_loss(self.choices, terms, norms),
            "kl": mean.token_kl,
            "entropy": mean.surprise,
            "old_kl": mean.old_kl,
            "ratio_mean": mean.ratio,
            "ratio_std": jnp.sqrt(jnp.maximum(mean.ratio_squared - mean.ratio**2, 0.0)),
            "clip_low": mean.clipped_low,
            "clip_high": mean.clipped_high,
            "tis_mean": mean.tis_weight,
            "tis_capped": mean.tis_capped,
            "outputs": norms.outputs,
            "tokens": norms.tokens,
        } | router_metrics(router, norms.rows)


@jax.custom_jvp
def valued(own: Array, exact: Array) -> Array:
    """Return the value `exact` with the derivative of `own`: one function by two programs, equal up to rounding.

    `exact` are the log-probabilities by the sampler's arithmetic (`inference.exact`), `own` those of the forward pass
    that is differentiated. Values, ratios and clips are then the sampler's bit for bit; the gradient is rounded as that
    of any backward pass.
    """
    return exact


@valued.defjvp
def _valued_jvp(primals, tangents):
    return primals[1], tangents[0]


def policy_logprobs(
    hidden_BSD: Array, head_DV: Array, targets_BS: Array, kept_BSW: Array | None, chunk: int, temperature: float
) -> Array:
    """Return FP32 log-probabilities of this device's targets, in nats; `targets_BS` and `kept_BSW` are whole rows."""
    targets_BS = context.local(targets_BS)
    kept_TW = None if kept_BSW is None else context.local(kept_BSW).reshape(-1, kept_BSW.shape[-1])
    hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    found_T, _ = token_logprobs(hidden_TD, head_DV, targets_BS.reshape(-1), chunk, kept_TW, temperature)
    return found_T.reshape(targets_BS.shape)


def policy_terms(choices: Choices, logprob_BS: Array, batch: Batch) -> PolicyTerms:
    """Return the sums of given log-probabilities of this device's tokens; `batch` has whole rows."""
    whole_BS = batch["loss_weights_BS"]
    weights_BS, old_BS = context.local(whole_BS), context.local(batch["old_logprobs_BS"])
    drawn_BS, lengths_B1 = weights_BS > 0, jnp.maximum(whole_BS.sum(-1, keepdims=True), 1.0)
    advantages_B1 = batch["advantages_B"][:, None]

    def over_output(x_BS):
        return context.total(jnp.where(drawn_BS, x_BS, 0.0).sum(-1, keepdims=True))

    log_ratio_BS = jnp.where(drawn_BS, logprob_BS - old_BS, 0.0)
    if choices.ratio != "token":
        level_B1 = over_output(log_ratio_BS)
        level_B1 = level_B1 if choices.ratio == "output" else level_B1 / lengths_B1
        own_BS = log_ratio_BS - lax.stop_gradient(log_ratio_BS)
        level_BS = jnp.broadcast_to(level_B1, log_ratio_BS.shape)
        log_ratio_BS = lax.stop_gradient(level_BS) + own_BS if choices.ratio == "sequence_token" else level_BS
    ratio_BS = _exp(log_ratio_BS)
    gain_BS = _gain(choices, ratio_BS, logprob_BS, advantages_B1)
    tis_BS = jnp.ones_like(ratio_BS)
    if choices.tis_cap:
        tis_BS = _exp(old_BS - context.local(batch["sampler_logprobs_BS"]))
        gain_BS *= jnp.minimum(tis_BS, choices.tis_cap)
    kl_BS = jnp.zeros_like(ratio_BS)
    if choices.kl_weight:
        behind_BS = jnp.where(drawn_BS, context.local(batch["reference_logprobs_BS"]) - logprob_BS, 0.0)
        behind_BS = over_output(behind_BS) if choices.ratio == "output" else behind_BS
        kl_BS = jnp.broadcast_to(_divergence(choices.kl, behind_BS), ratio_BS.shape)
    share_BS = weights_BS
    if choices.aggregation != "token":
        share_BS = weights_BS / (lengths_B1 if choices.aggregation == "sequence" else choices.constant_length)
    outside = ratio_BS < 1.0 - choices.clip_low, ratio_BS > 1.0 + choices.clip_high
    sums = (
        (gain_BS, share_BS),
        (kl_BS, share_BS),
        *((x_BS, weights_BS) for x_BS in (jnp.ones_like(ratio_BS), kl_BS, -logprob_BS, old_BS - logprob_BS)),
        *((x_BS, weights_BS) for x_BS in (ratio_BS, ratio_BS**2, *outside, tis_BS, tis_BS > (choices.tis_cap or 1e9))),
    )
    return PolicyTerms(*((x_BS * share_BS).sum() for x_BS, share_BS in sums))


def policy_loss(choices: Choices, terms: PolicyTerms, norms: PolicyNormalisers) -> Array:
    """Return the loss, or the part that the terms of one device and micro-batch have in it."""
    size = norms.tokens if choices.aggregation == "token" else norms.outputs
    return (choices.kl_weight * terms.kl - terms.gain) / jnp.maximum(size, 1)


def _gain(choices: Choices, ratio_BS: Array, logprob_BS: Array, advantages_B1: Array) -> Array:
    """Return what is maximised for each token."""
    clipped_BS = jnp.clip(ratio_BS, 1.0 - choices.clip_low, 1.0 + choices.clip_high)
    if choices.clip == "weight":
        return lax.stop_gradient(clipped_BS) * advantages_B1 * logprob_BS
    gain_BS = jnp.minimum(ratio_BS * advantages_B1, clipped_BS * advantages_B1)
    if choices.dual_clip:
        floor_B1 = choices.dual_clip * advantages_B1
        gain_BS = jnp.where(advantages_B1 < 0, jnp.maximum(gain_BS, floor_B1), gain_BS)
    return gain_BS


def _divergence(kind: str, behind: Array) -> Array:
    """Return an estimate of KL(pi || ref) from `behind` = log ref - log pi of what pi drew (Schulman 2020)."""
    if kind == "k1":
        return -behind
    return behind**2 / 2 if kind == "k2" else _exp(behind) - behind - 1.0


def _exp(x: Array) -> Array:
    """Return exp(x), and its tangent beyond `LARGEST_LOG_RATIO`."""
    return jnp.exp(jnp.minimum(x, LARGEST_LOG_RATIO)) * (1.0 + jnp.maximum(x - LARGEST_LOG_RATIO, 0.0))


def policy(choices: Choices, model: Model, loss: Loss, chunk: int, temperature: float = 1.0) -> Policy:
    """Return the objective, with the balance losses of pre-training off; outputs are drawn at `temperature`."""
    off = {"sequence_balance_weight": 0.0, "batch_balance_weight": 0.0, "mtp_weight": ()}
    return Policy(choices, model, dataclasses.replace(loss, **off), chunk, temperature)
