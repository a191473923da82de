"""The head: losses and log-probabilities of given tokens, without an array of tokens x vocabulary.

The problem. With V = 129,280 the logits of one sequence of 4096 tokens are 2.1 GB in FP32, as much again their
gradient, and the matmul that makes them is one of the largest of the model. Three ways to handle them:

    keep the logits      fastest to write, and the first thing that no longer fits
    recompute            chunks under jax.checkpoint: fits, but the head matmul runs twice in the forward direction
    gradient at once     the loss is the last node of the graph, so its gradient is known up to one scalar, the
                         incoming cotangent

We use the third. For a chunk of tokens T, with weights w, target y and z = logsumexp over the vocabulary of l = x W:

    loss   = sum_t w_t (z_t - l_t[y_t])               penalty = z_weight * sum_t w_t z_t^2
    dl/w   = softmax(l) (1 + 2 z_weight z) - onehot(y)
    dx     = dl W^T                                   dW += x^T dl

Three matmuls per chunk and none repeated; `dx` and `dW` wait as residuals and the backward pass multiplies them by the
cotangent. The price is a residual of the head's size in FP32, which the gradient of the head would have cost anyway.

This needs the cotangent of every token's loss up to one scalar, as pre-training has it (`cross_entropy`). Other
objectives weigh a token by the probability that the model gives it. For them `token_logprobs` returns the
log-probability and the logsumexp of every token, takes a cotangent g and h for each, and makes the logits once more in
the backward pass:

    logprob = l_t[y_t] - z_t        dl_t = g_t (onehot(y_t) - softmax(l_t)) + h_t softmax(l_t)

A token that was drawn among some of the vocabulary, by top-p for example, has its softmax over these (`kept_TW`, a bit
for each id): the logits of the others count as -inf.

Everything here is per-device code without collectives: inside `jax.shard_map` the caller sums over devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.parallel.mesh import vary


def cross_entropy(
    hidden_TD: Array, head_DV: Array, targets_T: Array, weights_T: Array, chunk: int, z_weight: float
) -> tuple[Array, Array]:
    """Return (loss_sum, z_sum): weighted sums over tokens of the cross entropy and of the logit penalty, FP32, in nats.

    Logits exist for `chunk` tokens at a time. The matmuls run in the dtype of `hidden_TD` and accumulate in FP32; the
    softmax is FP32. `z_sum` is `z_weight * sum(weights * logsumexp^2)`; a `z_weight` of 0 costs nothing. The two are
    one objective: the gradient of `loss_sum` is that of `loss_sum + z_sum`. Differentiation takes `z_sum` itself and
    the weights as constants.

    Raises:
        ValueError: `chunk` below 1.
    """
    _check_chunk(chunk)
    for other in (head_DV, targets_T, weights_T):
        hidden_TD = vary(hidden_TD, other)
    head_DV, targets_T, weights_T = (vary(other, hidden_TD) for other in (head_DV, targets_T, weights_T))
    return _cross_entropy(hidden_TD, head_DV, targets_T, weights_T, min(chunk, hidden_TD.shape[0]), z_weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden_TD, head_DV, targets_T, weights_T, chunk, z_weight):
    head = head_DV.astype(hidden_TD.dtype)

    def body(sums, tokens):
        hidden, targets, weights = tokens
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        z = jax.nn.logsumexp(logits, axis=-1)
        return _add_losses(sums, logits, z, targets, weights, z_weight), None

    zero = vary(jnp.zeros((), jnp.float32), hidden_TD)
    return lax.scan(body, (zero, zero), chunks((hidden_TD, targets_T, weights_T), chunk))[0]


def _forward_with_gradient(hidden_TD, head_DV, targets_T, weights_T, chunk, z_weight):
    """Return the sums, and as residuals of `jax.custom_vjp` the gradients for a cotangent of one."""
    head = head_DV.astype(hidden_TD.dtype)

    def body(carry, tokens):
        sums, head_grad = carry
        hidden, targets, weights = tokens
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        top = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        exp = jnp.exp(logits - top)
        total = exp.sum(axis=-1, keepdims=True)
        z = (top + jnp.log(total))[:, 0]
        sums = _add_losses(sums, logits, z, targets, weights, z_weight)
        share = weights * (1.0 + 2.0 * z_weight * z) / total[:, 0]
        hit = targets[:, None] == jnp.arange(head.shape[1])
        grad = (exp * share[:, None] - jnp.where(hit, weights[:, None], 0.0)).astype(head.dtype)
        head_grad += jnp.matmul(hidden.T, grad, preferred_element_type=jnp.float32)
        return (sums, head_grad), jnp.matmul(grad, head.T, preferred_element_type=jnp.float32).astype(hidden.dtype)

    zero = vary(jnp.zeros((), jnp.float32), hidden_TD)
    carry = (zero, zero), vary(jnp.zeros(head.shape, jnp.float32), hidden_TD)
    (sums, head_grad_DV), hidden_grad = lax.scan(body, carry, chunks((hidden_TD, targets_T, weights_T), chunk))
    # Fusing the joined chunks into the norm's derivative crashes the compiler for tpu7x (libtpu 0.0.48.1, "Scaled
    # window bound").
    hidden_grad_TD = lax.optimization_barrier(hidden_grad.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]])
    return sums, (hidden_grad_TD, head_grad_DV.astype(head_DV.dtype))


def _backward(chunk, z_weight, gradients, cotangents):
    scale = cotangents[0]
    return *((gradient * scale).astype(gradient.dtype) for gradient in gradients), None, None


_cross_entropy.defvjp(_forward_with_gradient, _backward)


def _add_losses(sums, logits, z, targets, weights, z_weight):
    """Add one chunk's loss and penalty to the running sums."""
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return sums[0] + (weights * (z - target_logits)).sum(), sums[1] + z_weight * (weights * z * z).sum()


def chunks(arrays, chunk):
    """Cut the token dim of arrays into [chunks, chunk, ...]; the last chunk is filled with zeros, without weight."""
    missing = -arrays[0].shape[0] % chunk

    def cut(x):
        return jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    return jax.tree.map(cut, arrays)


def token_logprobs(
    hidden_TD: Array,
    head_DV: Array,
    targets_T: Array,
    chunk: int,
    kept_TW: Array | None = None,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Return (logprob_T, log_z_T): log-probabilities of the targets and logsumexps of the logits, FP32, in nats.

    Both have a derivative with a cotangent per token. Logits exist for `chunk` tokens at a time, in both directions.
    The matmuls run in the dtype of `hidden_TD` and accumulate in FP32; the softmax is FP32.

    Args:
        hidden_TD: after the final norm.
        head_DV: of the model.
        targets_T: int32.
        chunk: tokens.
        kept_TW: int32; bit i of word w says whether id 32 w + i is one of the softmax; no bit at all: all ids are.
        temperature: the FP32 logits are divided by it, as a sampler divides them.

    Raises:
        ValueError: `chunk` below 1.
    """
    _check_chunk(chunk)
    others = (head_DV, targets_T) if kept_TW is None else (head_DV, targets_T, kept_TW)
    for other in others:
        hidden_TD = vary(hidden_TD, other)
    head_DV, targets_T, *rest = (vary(other, hidden_TD) for other in others)
    kept_TW = rest[0] if rest else None
    return _token_logprobs(hidden_TD, head_DV, targets_T, kept_TW, min(chunk, hidden_TD.shape[0]), temperature)


def _kept_logits(hidden: Array, head: Array, kept_TW: Array | None, temperature: float) -> Array:
    """Return FP32 logits over the temperature, -inf for ids that are not kept."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32) / temperature
    if kept_TW is None:
        return logits
    bits = kept_TW[:, :, None] >> jnp.arange(32) & 1
    kept = bits.reshape(len(kept_TW), -1)[:, : logits.shape[1]] > 0
    kept = jnp.pad(kept, ((0, 0), (0, logits.shape[1] - kept.shape[1])))  # ids that the sampler does not know
    return jnp.where(kept | (kept_TW == 0).all(-1, keepdims=True), logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_logprobs(hidden_TD, head_DV, targets_T, kept_TW, chunk, temperature):
    head = head_DV.astype(hidden_TD.dtype)

    def body(_, tokens):
        hidden, targets, kept = tokens
        logits = _kept_logits(hidden, head, kept, temperature)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return None, (jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - log_z, log_z)

    _, results = lax.scan(body, None, chunks((hidden_TD, targets_T, kept_TW), chunk))
    return tuple(x.reshape(-1)[: hidden_TD.shape[0]] for x in results)


def _token_logprobs_forward(hidden_TD, head_DV, targets_T, kept_TW, chunk, temperature):
    found: Any = _token_logprobs(hidden_TD, head_DV, targets_T, kept_TW, chunk, temperature)
    logprob_T, log_z_T = found
    return (logprob_T, log_z_T), (hidden_TD, head_DV, targets_T, kept_TW, log_z_T)


def _token_logprobs_backward(chunk, temperature, residuals, cotangents):
    hidden_TD, head_DV, targets_T, kept_TW, log_z_T = residuals
    head = head_DV.astype(hidden_TD.dtype)

    def body(head_grad, tokens):
        hidden, targets, kept, log_z, by_logprob, by_log_z = tokens
        logits = _kept_logits(hidden, head, kept, temperature)
        probabilities = jnp.exp(logits - log_z[:, None])
        hit = targets[:, None] == jnp.arange(head.shape[1])
        grad = probabilities * (by_log_z - by_logprob)[:, None] + jnp.where(hit, by_logprob[:, None], 0.0)
        grad = (grad / temperature).astype(head.dtype)
        head_grad += jnp.matmul(hidden.T, grad, preferred_element_type=jnp.float32)
        return head_grad, jnp.matmul(grad, head.T, preferred_element_type=jnp.float32).astype(hidden.dtype)

    zeros = vary(jnp.zeros(head.shape, jnp.float32), hidden_TD)
    head_grad_DV, hidden_grad = lax.scan(
        body, zeros, chunks((hidden_TD, targets_T, kept_TW, log_z_T, *cotangents), chunk)
    )
    hidden_grad_TD = hidden_grad.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    return hidden_grad_TD, head_grad_DV.astype(head_DV.dtype), None, None


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(
            f"loss_chunk = {chunk}: at least one token's logits must exist at a time; set execution.loss_chunk to 1 or"
            " more"
        )
