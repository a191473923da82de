"""What on-policy distillation minimises: the reverse KL of student and teacher, exact at every token the student drew.

The student p draws an answer y to a prompt x, and at each of its tokens both say what might follow. With v over the
whole vocabulary, q the teacher, and t over the tokens of the answers of a step:

    kl_t = sum_v p(v | x, y_<t) (log p(v | x, y_<t) - log q(v | x, y_<t))         loss = mean_t kl_t

The gradient of a token, in the logits l of the student, is known with the logits themselves (see `model.head`):

    d kl_t / d l_v = p_v (log p_v - log q_v - kl_t)

The choice is the exact sum. The usual estimate, log p(y_t) - log q(y_t) of the token that was drawn, has the same mean
and needs one number of the teacher per token, which counts where the teacher is a service. But its gradient is that of
a policy (REINFORCE), with a variance that the exact one has not; and here the teacher's network runs beside the
student's anyway, so the exact sum costs one product with the teacher's head more. `sampled_kl` reports the estimate.

A draw is one of the tokenizer's ids, and the sum is over all `model.vocab_size` ids of the heads: where the vocabulary
is padded to a round size, the student also learns which share the teacher gives ids that are never drawn.

Gradients do not go through the draws: that an early token leads to states where both differ is not counted
(generalised knowledge distillation, arXiv 2306.13649, section 3, with divergence KL(student || teacher); a discount of
0 in Thinking Machines' "On-Policy Distillation", 2025). MiniLLM (arXiv 2306.08543) counts it.

Reverse KL makes the student sure where the teacher is: it pays for mass where q has none, and nothing for the answers
of the teacher that it leaves out. So it needs a student that sometimes draws what the teacher would; fine-tuning on the
teacher's samples (`posttraining.sft`), which is forward KL up to a constant, makes one.

The teacher's hidden states of the whole batch come first, in a pass without a gradient; then the student's step makes
the logits of both, `loss_chunk` tokens at a time, so that no array of tokens x vocabulary exists. The teacher's head is
whole on every device.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.config import Loss, Model
from deepseek_jax.model.balance import RouterStats, router_stats
from deepseek_jax.model.head import chunks
from deepseek_jax.model.moe import Observer
from deepseek_jax.model.transformer import Output, apply
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parameters import P, Weights
from deepseek_jax.posttraining.forward import over_rows
from deepseek_jax.training.micro_batches import split
from deepseek_jax.training.network_inputs import network_inputs
from deepseek_jax.training.objective import Batch, router_metrics
from deepseek_jax.training.optimizer import Rates
from deepseek_jax.training.state import State, weights_of
from deepseek_jax.training.step import Recipe, gradients, update

HIDDEN, HEAD = "teacher_hidden_BSD", "teacher_head_DV"
READ = "tokens_BS", "positions_BS", "segment_ids_BS"


class DistillationTerms(NamedTuple):
    """Weighted sums over tokens of answers, in nats but for the last."""

    kl: Array  # KL(student || teacher), exact
    sampled_kl: Array  # log p - log q of the drawn tokens, whose mean is that of `kl`
    entropy: Array  # of the student, exact
    agreement: Array  # tokens at which both find the same successor the likeliest


class DistillationNormalisers(NamedTuple):
    """Sizes of a step."""

    tokens: Array  # of answers, FP32
    rows: Array  # that are not all padding, int32


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The mean reverse KL; MTP layers do not run. A `training.objective.Objective`.

    Its batch has, beside the network's inputs, `targets_BS`, `loss_weights_BS` (1 on targets that the student drew,
    else 0) and `teacher_hidden_BSD`; `teacher_head_DV` is shared by its rows.

    Attributes:
        model: the student's.
        loss: balance losses, which are off in `distillation`.
        chunk: tokens whose logits exist at once, of both.
    """

    model: Model
    loss: Loss
    chunk: int
    batch_wise = False

    @property
    def observe(self) -> Observer:
        """Report counts."""
        return functools.partial(router_stats, self.loss)

    def normalisers(self, batch: Batch) -> DistillationNormalisers:
        """Return this device's tokens and rows."""
        rows = (batch["segment_ids_BS"] > 0).any(-1).sum(dtype=jnp.int32)
        return DistillationNormalisers(batch["loss_weights_BS"].sum(), rows)

    def next_tokens(self, batch: Batch) -> Array | None:
        """Return None: MTP layers do not run."""
        return None

    def terms(self, output: Output, head_DV: Array, batch: Batch) -> DistillationTerms:
        """Sum over the tokens of one device and micro-batch."""
        flat = [x.reshape(-1, *x.shape[2:]) for x in (output.hidden_BSD, batch[HIDDEN])]
        targets_T, weights_T = (batch[name].reshape(-1) for name in ("targets_BS", "loss_weights_BS"))
        with jax.named_scope("head"):
            return reverse_kl(flat[0], head_DV, flat[1], batch[HEAD], targets_T, weights_T, self.chunk)

    def total(
        self, terms: DistillationTerms, router: RouterStats, norms: DistillationNormalisers, rates: Rates
    ) -> Array:
        """Return the loss."""
        return terms.kl / jnp.maximum(norms.tokens, 1.0)

    def metrics(
        self, terms: DistillationTerms, router: RouterStats, norms: DistillationNormalisers
    ) -> dict[str, Array]:
        """Return means over tokens of answers."""
        mean = DistillationTerms(*(x / jnp.maximum(norms.tokens, 1.0) for x in terms))
        return {"loss": mean.kl, "tokens": norms.tokens} | mean._asdict() | router_metrics(router, norms.rows)


def distillation(model: Model, loss: Loss, chunk: int) -> Distillation:
    """Return the objective, with the balance losses of pre-training off."""
    off = {"sequence_balance_weight": 0.0, "batch_balance_weight": 0.0, "mtp_weight": ()}
    return Distillation(model, dataclasses.replace(loss, **off), chunk)


def reverse_kl(
    hidden_TD: Array,
    head_DV: Array,
    teacher_hidden_TD: Array,
    teacher_head_DV: Array,
    targets_T: Array,
    weights_T: Array,
    chunk: int,
) -> DistillationTerms:
    """Return the sums over a student's and a teacher's logits; the widths D of both may differ.

    Logits exist for `chunk` tokens at a time, and once. The matmuls run in the dtypes of the hidden states and
    accumulate in FP32; the softmaxes are FP32. Only `kl` has a derivative, in the student's two arrays.
    """
    others = head_DV, teacher_hidden_TD, teacher_head_DV, targets_T, weights_T
    for other in others:
        hidden_TD = vary(hidden_TD, other)
    varying = (vary(other, hidden_TD) for other in others)
    sums: Any = _reverse_kl(hidden_TD, *varying, min(chunk, hidden_TD.shape[0]))
    return DistillationTerms(*sums)


def _scan(arrays, chunk, differentiate: bool):
    """Return the sums, and with `differentiate` the gradients of the first by the student's hidden states and head."""
    hidden_TD, head_DV, teacher_hidden_TD, teacher_head_DV, targets_T, weights_T = arrays
    head, teacher_head = head_DV.astype(hidden_TD.dtype), teacher_head_DV.astype(teacher_hidden_TD.dtype)

    def body(carry, tokens):
        sums, head_grad = carry
        hidden, teacher_hidden, targets, weights = tokens
        log_p = jax.nn.log_softmax(jnp.matmul(hidden, head, preferred_element_type=jnp.float32))
        log_q = jax.nn.log_softmax(jnp.matmul(teacher_hidden, teacher_head, preferred_element_type=jnp.float32))
        p, apart = jnp.exp(log_p), log_p - log_q
        kl = (p * apart).sum(-1)
        drawn = jnp.take_along_axis(apart, targets[:, None], axis=-1)[:, 0]
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        values = kl, drawn, -(p * log_p).sum(-1), agree
        sums = tuple(total + (weights * value).sum() for total, value in zip(sums, values, strict=True))
        if not differentiate:
            return (sums, head_grad), None
        grad = (weights[:, None] * p * (apart - kl[:, None])).astype(head.dtype)
        head_grad += jnp.matmul(hidden.T, grad, preferred_element_type=jnp.float32)
        return (sums, head_grad), jnp.matmul(grad, head.T, preferred_element_type=jnp.float32).astype(hidden.dtype)

    zero = vary(jnp.zeros((), jnp.float32), hidden_TD)
    head_grad = vary(jnp.zeros(head.shape if differentiate else (), jnp.float32), hidden_TD)
    tokens = chunks((hidden_TD, teacher_hidden_TD, targets_T, weights_T), chunk)
    return lax.scan(body, ((zero,) * 4, head_grad), tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _reverse_kl(hidden_TD, head_DV, teacher_hidden_TD, teacher_head_DV, targets_T, weights_T, chunk):
    arrays = hidden_TD, head_DV, teacher_hidden_TD, teacher_head_DV, targets_T, weights_T
    return _scan(arrays, chunk, differentiate=False)[0][0]


def _forward_with_gradient(*arguments):
    *arrays, chunk = arguments
    (sums, head_grad_DV), hidden_grad = _scan(arrays, chunk, differentiate=True)
    assert hidden_grad is not None  # `_scan` differentiated
    hidden_TD, head_DV = arrays[:2]
    hidden_grad_TD = hidden_grad.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    return sums, (hidden_grad_TD, head_grad_DV.astype(head_DV.dtype))


def _backward(chunk, gradients, cotangents):
    return *((gradient * cotangents[0]).astype(gradient.dtype) for gradient in gradients), None, None, None, None


_reverse_kl.defvjp(_forward_with_gradient, _backward)


def teacher_hidden(teacher: Recipe, weights: Weights, batch: Batch) -> Array:
    """Return the teacher's hidden states in front of its head, [B, S, D], a micro-batch at a time."""
    model, execution = teacher.model, teacher.execution

    def forward(weights, batch, load):

        def run(rows):
            inputs = network_inputs(model, execution, teacher.objective, rows)
            return apply(model, execution, weights, inputs, load, teacher.objective.observe, 1).hidden_BSD

        return lax.map(run, split(batch, teacher.micro_batch_size)).reshape(*batch["tokens_BS"].shape, -1)

    return over_rows(model, execution, forward, weights, batch)


def distillation_step(
    recipe: Recipe, teacher: Recipe, taught_by: Weights, state: State, batch: Batch, rates: Rates
) -> tuple[State, dict[str, Array]]:
    """Take one optimizer step of the student of `recipe`, with the weights of the `teacher`; else as `train_step`."""
    hidden_BSD = teacher_hidden(teacher, taught_by, {name: batch[name] for name in READ})
    shared = {HEAD: jax.sharding.reshard(taught_by.params["head_DV"], P())}
    grads, sums, norms = gradients(recipe, weights_of(state), batch | {HIDDEN: hidden_BSD}, rates, shared=shared)
    return update(recipe, state, grads, sums, norms, rates)
