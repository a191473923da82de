"""The pure training and evaluation steps.

Order inside `train_step`: forward with MTP and losses, gradients, accumulated over micro-batches together with integer
expert counts, all inside one shard_map; then the optimizer, then one update of the router biases from the global
counts. Losses are sums over this device's tokens divided by global normalisers that are known before the first
micro-batch, so micro-batches and devices only ever add.

A step whose loss or gradients are not finite changes nothing but `step` and `skipped`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from deepseek_jax.config import Config, resolve
from deepseek_jax.model.balance import RouterStats, max_violation, update_bias
from deepseek_jax.model.transformer import Output, apply, compute_dtype
from deepseek_jax.parallel.mesh import axis_size, check_fit
from deepseek_jax.parallel.weights import attach, detach, gather, quantize_weights, reduce_gradients
from deepseek_jax.parameters import EXPERTS, ROWS, P, partition_specs
from deepseek_jax.training.losses import cross_entropy, mtp_targets
from deepseek_jax.training.optimizer import Rates, ema_update, make_optimizer
from deepseek_jax.training.state import State
from pallas_kernels.manual_axes import varies_over

Batch = dict[str, jax.Array]


class Sums(NamedTuple):
    """What a forward pass adds up over tokens, sequences, micro-batches and devices."""

    loss: jax.Array  # nats
    z: jax.Array
    mtp: jax.Array  # [MTP layers], nats
    router: RouterStats  # leading dim: layers with a router


class Normalisers(NamedTuple):
    """Global sizes of a batch, over all micro-batches and devices."""

    weight: jax.Array  # sum of the loss weights
    tokens: jax.Array  # positions that are not padding, int32
    sequences: jax.Array  # rows that are not all padding, int32


def jit_train_step(
    config: Config, mesh: jax.sharding.Mesh
) -> Callable[[State, Batch, Rates], tuple[State, dict[str, jax.Array]]]:
    """Compile-ready `train_step` for a mesh, with "auto" choices resolved and the state donated. Call it under
    `jax.set_mesh(mesh)`.
    """
    check_fit(config, mesh)
    return jit_on(train_step, config, mesh, donate_argnums=0)


def jit_eval_step(config: Config, mesh: jax.sharding.Mesh) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
    """Compile-ready `eval_step` for a mesh. Call it under `jax.set_mesh(mesh)`."""
    return jit_on(eval_step, config, mesh)


def jit_on(step: Callable, config: Config, mesh: jax.sharding.Mesh, **options) -> Callable:
    """Jit `step` so that "fp32" is FP32 everywhere: unless told not to, GPUs multiply FP32 in TF32 and TPUs in BF16.

    On a GPU cuBLAS alone does these products: choosing among Triton kernels of full precision took more than 500 s for
    `tiny` on an H200, against 10 s without them (experiments/log.md).
    """
    platform = mesh.devices.flat[0].platform
    exact = config.execution.precision == "fp32" and platform != "cpu"
    config = resolve_for(config, mesh)

    def run(*arguments):
        with jax.default_matmul_precision("highest" if exact else None):
            return step(config, *arguments)

    if exact and platform == "gpu":
        options["compiler_options"] = {"xla_gpu_enable_triton_gemm": False}
    return jax.jit(run, **options)


def resolve_for(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """Replace "auto" choices by what they mean on this mesh."""
    return resolve(config, mesh.devices.flat[0].platform, axis_size(mesh, EXPERTS))


def train_step(config: Config, state: State, batch: Batch, rates: Rates) -> tuple[State, dict[str, jax.Array]]:
    """Take one optimizer step.

    Args:
        config: resolved.
        state: see `training.state`.
        batch: int32 `tokens_BS`, `targets_BS`, `positions_BS`, `segment_ids_BS` and FP32 `loss_weights_BS`, B sequences
            over all devices, split over `ROWS`; B is a multiple of `training.micro_batch_size`.
        rates: this step's learning rate, MTP weight and bias update rate.

    Returns:
        the new state, and metrics: replicated scalars and per-layer arrays (losses in nats per token).
    """
    grads, sums, norms = gradients(config, state["params"], state["router_bias"], batch, rates.mtp_weight)
    return update(config, state, grads, sums, norms, rates)


def gradients(
    config: Config, params: Any, router_bias: Any, batch: Batch, mtp_weight: jax.Array
) -> tuple[Any, Sums, Normalisers]:
    """Differentiate the objective of a whole batch: FP32 gradients in the layout of the parameters, and global sums."""
    specs = partition_specs(params)
    rows = {name: P(ROWS, None) for name in batch}
    in_specs = (specs, jax.tree.map(lambda _: P(), router_bias), rows, P())
    local = jax.shard_map(functools.partial(_local_gradients, config), in_specs=in_specs, out_specs=(specs, P(), P()))
    return local(params, router_bias, batch, mtp_weight)


def update(
    config: Config, state: State, grads: Any, sums: Sums, norms: Normalisers, rates: Rates
) -> tuple[State, dict[str, jax.Array]]:
    """Apply gradients and expert counts to the state, unless something is not finite; return it with the step's
    metrics.
    """
    params = state["params"]
    metrics = _loss_metrics(config, sums, norms)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(
            grads
        )  # it can overflow where no element does, and clipping then leaves nothing of the gradient
        nonfinite = sum(
            jnp.sum(~jnp.isfinite(a), dtype=jnp.int32) for a in (*jax.tree.leaves(grads), grad_norm, metrics["loss"])
        )
        direction, optimizer = make_optimizer(config.optimizer).update(grads, state["optimizer"], params)
        new = {
            "params": jax.tree.map(lambda p, d: p - rates.learning_rate * d, params, direction),
            "router_bias": _update_biases(state["router_bias"], sums.router.counts_E, rates.bias_update_rate),
            "optimizer": optimizer,
        }
        if "ema" in state:
            new["ema"] = ema_update(state["ema"], new["params"], config.optimizer.ema_decay)
        finite = nonfinite == 0
        new = jax.tree.map(
            lambda after, before: jnp.where(finite, after, before), new, {name: state[name] for name in new}
        )
        param_norm, direction_norm = _norms(new["params"], direction)
    new |= {"step": state["step"] + 1, "skipped": jnp.where(finite, 0, state["skipped"] + 1)}
    metrics |= {
        "grad_norm": grad_norm,
        "update_norm": rates.learning_rate * direction_norm,
        "param_norm": param_norm,
        "nonfinite": nonfinite,
        "skipped": new["skipped"],
    }
    return new, metrics | _bias_metrics(new["router_bias"])


def _norms(params: Any, direction: Any) -> tuple[jax.Array, jax.Array]:
    """Return the global L2 norms of two trees in the layout of the parameters, with one reduction of two operands per
    leaf.

    XLA:GPU then makes parameters, moments and both sums in one pass and in place (tests/training/test_aot_update.py). A
    fusion may overwrite what one reduction reads, not two: with a reduction per norm the direction went to memory and
    back. Rows are summed first because a single sum over all dims becomes blocks of 1024 threads, and a multiprocessor
    has registers for one of those. Each device sums its own part because the partitioner gathers the operands' partial
    sums, where it would add those of a plain reduction.
    """

    def local(first, second):
        def squares(x, y):
            zero = jnp.zeros((), x.dtype)
            rows = lax.reduce((x * x, y * y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (x.ndim - 1,))
            return lax.psum(jnp.stack([row.sum() for row in rows]), tuple(sorted(varies_over(x))))

        first_norm, second_norm = jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(squares, first, second))))
        return first_norm, second_norm

    specs = partition_specs(params)
    return jax.shard_map(local, in_specs=(specs, specs), out_specs=P())(params, direction)


def eval_step(config: Config, params: Any, router_bias: Any, batch: Batch) -> dict[str, jax.Array]:
    """Sum the losses of a batch: `loss_sum` and `weight_sum` (nats, tokens), `mtp_loss_sum` [MTP layers], `counts_LE`
    int32.
    """

    def local(params, router_bias, batch):
        load = functools.partial(gather, dtype=compute_dtype(config))
        params = with_fp8(config, params)
        output = apply(config, params, router_bias, batch, load)
        sums = _token_sums(config, output, load({"head_DV": params["head_DV"]})["head_DV"], batch)
        return lax.psum((sums, batch["loss_weights_BS"].sum()), ROWS)

    specs = (partition_specs(params), jax.tree.map(lambda _: P(), router_bias), {name: P(ROWS, None) for name in batch})
    sums, weight = jax.shard_map(local, in_specs=specs, out_specs=P())(params, router_bias, batch)
    return {"loss_sum": sums.loss, "weight_sum": weight, "mtp_loss_sum": sums.mtp, "counts_LE": sums.router.counts_E}


def _local_gradients(config: Config, params, router_bias, batch: Batch, mtp_weight: jax.Array):
    """One device's part: gradients in the layout of the parameters, and global sums. Runs inside the shard_map."""
    norms = _normalisers(batch)
    load = functools.partial(gather, dtype=compute_dtype(config))
    once = config.execution.gather == "step"
    weights = with_fp8(config, params)
    weights, quantized = detach(load(weights) if once else weights)

    def loss(weights, micro_batch):
        weights = attach(weights, quantized)
        layer_load = (lambda tree: tree) if once else load
        output = apply(config, weights, router_bias, micro_batch, layer_load)
        sums = _token_sums(config, output, layer_load({"head_DV": weights["head_DV"]})["head_DV"], micro_batch)
        return _total_loss(config, sums, norms, mtp_weight), sums

    def one(micro_batch):
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(weights, micro_batch)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    micro_batches = _split(config, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    if micro_batches["tokens_BS"].shape[0] == 1:
        grads, sums = one(first)
    else:
        rest = jax.tree.map(lambda x: x[1:], micro_batches)
        grads, sums = lax.scan(
            lambda total, micro_batch: (jax.tree.map(jnp.add, total, one(micro_batch)), None), one(first), rest
        )[0]
    return reduce_gradients(grads) if once else grads, lax.psum(sums, ROWS), norms


def with_fp8(config: Config, params: Any) -> Any:
    """Quantise this device's part of the weights, where the precision is FP8."""
    return attach(params, quantize_weights(params)) if config.execution.precision == "fp8" else params


def _split(config: Config, batch: Batch) -> Batch:
    """[rows, S] of this device to [micro-batches, rows, S]."""
    devices = lax.psum(1, ROWS)
    rows = batch["tokens_BS"].shape[0]
    count, left = divmod(rows * devices, config.training.micro_batch_size)
    if left or not count:
        raise ValueError(
            f"a batch of {rows * devices} sequences is no multiple of training.micro_batch_size ="
            f" {config.training.micro_batch_size}"
        )
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def _normalisers(batch: Batch) -> Normalisers:
    valid_BS = batch["segment_ids_BS"] > 0
    local = Normalisers(
        batch["loss_weights_BS"].sum(), valid_BS.sum(dtype=jnp.int32), valid_BS.any(-1).sum(dtype=jnp.int32)
    )
    return lax.psum(local, ROWS)


def _token_sums(config: Config, output: Output, head_DV: jax.Array, batch: Batch) -> Sums:
    """Sum the losses over this device's tokens."""

    def head_loss(hidden_BSD, targets_BS, weights_BS, z_weight):
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        return cross_entropy(
            hidden_TD, head_DV, targets_BS.reshape(-1), weights_BS.reshape(-1), config.execution.loss_chunk, z_weight
        )

    with jax.named_scope("head"):
        loss, z = head_loss(output.hidden_BSD, batch["targets_BS"], batch["loss_weights_BS"], config.loss.z_loss_weight)
        mtp = []
        for depth, hidden_BSD in enumerate(output.mtp_hidden, start=1):
            _, targets_BS, weights_BS = mtp_targets(batch, depth)
            mtp.append(head_loss(hidden_BSD, targets_BS, weights_BS, 0.0)[0])
    return Sums(loss, z, jnp.stack(mtp) if mtp else jnp.zeros_like(loss, shape=(0,)), output.stats)


def _total_loss(config: Config, sums: Sums, norms: Normalisers, mtp_weight: jax.Array) -> jax.Array:
    """The objective: V3 eq. 24, 25 (MTP, divided by the main loss's tokens) and 17 (balance, summed over layers)."""
    weight = jnp.maximum(norms.weight, 1e-9)
    total = (sums.loss + sums.z) / weight
    if config.model.num_mtp_layers:
        total += mtp_weight * sums.mtp.mean() / weight
    return total + _balance_loss(config, sums.router, norms)


def _balance_loss(config: Config, router: RouterStats, norms: Normalisers) -> jax.Array:
    sequence = config.loss.sequence_balance_weight * router.sequence_balance.sum() / jnp.maximum(norms.sequences, 1)
    return sequence + config.loss.batch_balance_weight * router.batch_balance.sum() / jnp.maximum(norms.tokens, 1)


def _loss_metrics(config: Config, sums: Sums, norms: Normalisers) -> dict[str, jax.Array]:
    weight = jnp.maximum(norms.weight, 1e-9)
    counts_LE = sums.router.counts_E
    return {
        "loss": sums.loss / weight,
        "z_loss": sums.z / weight,
        "mtp_loss": sums.mtp / weight,
        "balance_loss": _balance_loss(config, sums.router, norms),
        "counts_LE": counts_LE,
        "max_vio_L": max_violation(counts_LE),
        "max_vio_sequence_L": sums.router.violation / jnp.maximum(norms.sequences, 1),
        "dead_experts": jnp.sum(counts_LE == 0, dtype=jnp.int32),
        "tokens": norms.tokens,
    }


def _update_biases(router_bias, counts_LE: jax.Array, rate: jax.Array):
    """Give each stack of biases its rows of the counts (MoE layers first, then MTP layers) and take one step."""
    leaves, tree = jax.tree.flatten(router_bias)
    starts = [sum(leaf.shape[0] for leaf in leaves[:i]) for i in range(len(leaves))]
    counts = [counts_LE[start : start + leaf.shape[0]] for start, leaf in zip(starts, leaves, strict=True)]
    return jax.tree.unflatten(
        tree, [update_bias(leaf, count, rate) for leaf, count in zip(leaves, counts, strict=True)]
    )


def _bias_metrics(router_bias) -> dict[str, jax.Array]:
    bias_LE = jnp.concatenate(jax.tree.leaves(router_bias))
    return {"bias_min_L": bias_LE.min(-1), "bias_max_L": bias_LE.max(-1)}
