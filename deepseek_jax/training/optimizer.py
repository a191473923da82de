"""AdamW with BF16 moments, and the schedules: everything in the recipe that changes with the tokens seen.

`make_optimizer` makes an Optax transformation without a learning rate: it clips gradients, divides them by their
running scale and adds the decoupled weight decay. The result is a *direction* to subtract:

    params <- params - learning_rate * direction            (FP32 master weights)

The learning rate comes from `Rates` with every step. Rates follow the tokens seen, which pass 2^31 within minutes on a
cluster. So the host computes them from an exact Python int, and they enter the compiled step as three scalars; the step
never sees a schedule.

Recipe: DeepSeek-V3, arXiv 2412.19437, section 4.2. Moments in BF16: section 3.3.3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from deepseek_jax.config import Config, Optimizer
from deepseek_jax.config_checks import LARGEST_B2
from deepseek_jax.parameters import PARAMETERS, P, leaf_name, partition_specs
from deepseek_jax.schedule import schedule_value
from pallas_kernels.lowering.manual_axes import varies_over

MOMENT_DTYPE = jnp.bfloat16


class Rates(NamedTuple):
    """What the schedules say about one step, as host-side FP32 scalars."""

    learning_rate: np.float32
    mtp_weight: np.float32
    bias_update_rate: np.float32


def make_optimizer(optimizer: Optimizer) -> optax.GradientTransformation:
    """Return clip -> Adam -> weight decay; its updates are the direction to subtract, before the learning rate.

    Raises:
        ValueError: `b2` above 0.99: BF16 moments would stop moving.
    """
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        scale_by_bf16_adam(optimizer.b1, optimizer.b2, optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask),
    )


def scale_by_bf16_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Return `optax.scale_by_adam` with both moments stored in BF16 and updated in FP32.

    Optax itself cannot set the dtype of the second moment.
    """
    if b2 > LARGEST_B2:
        raise ValueError(
            f"optimizer.b2 = {b2}: BF16 moments lose small updates above {LARGEST_B2}; lower it (the report uses 0.95)"
        )
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params):
        return _cast_moments(adam.init(params), MOMENT_DTYPE)

    def update(gradients, state, params=None):
        direction, state = adam.update(gradients, _cast_moments(state, jnp.float32), params)
        return direction, _cast_moments(state, MOMENT_DTYPE)

    return optax.GradientTransformation(init, update)


def _cast_moments(state: optax.ScaleByAdamState, dtype) -> optax.ScaleByAdamState:
    mu, nu = jax.tree.map(lambda moment: moment.astype(dtype), (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)


def decay_mask(params) -> dict:
    """Return a tree of bools: whether weight decay applies, to matrices and the embedding but not to norm gains."""
    return jax.tree.map_with_path(lambda path, _: PARAMETERS[leaf_name(path)].decayed, params)


def rates(config: Config, step: int, tokens_seen: int) -> Rates:
    """Return the rates of optimizer step `step` (from 0) of a run that has seen `tokens_seen` tokens before it.

    The learning rate rises linearly over the first `warmup_steps` steps; the last of them has the full rate.
    """
    fraction = tokens_seen / config.training.num_tokens
    warmup = min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))
    factor = warmup * config.optimizer.learning_rate_factor
    return Rates(
        learning_rate=np.float32(factor * schedule_value(config.optimizer.learning_rate, fraction)),
        mtp_weight=np.float32(schedule_value(config.loss.mtp_weight, fraction)),
        bias_update_rate=np.float32(schedule_value(config.optimizer.bias_update_rate, fraction)),
    )


def batch_size(config: Config, tokens_seen: int) -> int:
    """Return how many sequences the next optimizer step takes over all devices: the batch-size ramp."""
    return int(schedule_value(config.training.batch_size, tokens_seen / config.training.num_tokens))


def ema_update(ema, params, decay: float):
    """Return the exponential moving average `decay * ema + (1 - decay) * params`, leaf by leaf, in FP32."""

    def update(average: Array, value: Array) -> Array:
        return average + (1.0 - decay) * (value - average)

    return jax.tree.map(update, ema, params)


def on_host(optimizer: Optimizer) -> bool:
    """Return whether the average of the parameters lies in host memory, and so beside the step."""
    return optimizer.ema_decay > 0.0 and optimizer.ema_memory == "host"


def global_norms(params: Any, direction: Any) -> tuple[jax.Array, jax.Array]:
    """Return the global L2 norms of two trees in the layout of the parameters.

    Each leaf has one reduction of two operands. XLA:GPU then makes parameters, moments and both sums in one pass and in
    place (tests/training/test_aot_update.py). A fusion may overwrite what one reduction reads, not what two read: with
    a reduction per norm the direction went to memory and back. Rows are summed first because a single sum over all dims
    becomes blocks of 1024 threads, and a multiprocessor has registers for only one of those. Each device sums its own
    part because the partitioner would gather the partial sums of two operands; those of a plain reduction it adds.
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
