"""The network on a training batch, as tests call it: the arrays of one device, whole."""

import functools
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.model import transformer
from deepseek_jax.model.balance import router_stats
from deepseek_jax.model.transformer import Inputs, Output, shifted
from deepseek_jax.parameters import Weights


def inputs_of(batch: dict[str, Any], num_mtp_layers: int) -> Inputs:
    """Return what the network reads of a batch, MTP's tokens included."""
    segments_BS = batch["segment_ids_BS"]
    following = tuple(shifted(batch["targets_BS"], depth) for depth in range(num_mtp_layers))
    return Inputs(batch["tokens_BS"], batch["positions_BS"], segments_BS > 0, segments_BS, following)


def apply(
    config: Config, params: Any, router_bias: Any, batch: dict[str, Any], gather=lambda tree: tree, observe=None
) -> Output:
    """Run the network of a resolved config; it observes what balancing needs, unless told otherwise."""
    observe = observe or functools.partial(router_stats, config.loss)
    weights = Weights(params, router_bias)
    return transformer.apply(
        config.model, config.execution, weights, inputs_of(batch, config.model.num_mtp_layers), gather, observe
    )


def abstract_weights(config: Config) -> Weights:
    """Return the shapes of what `init` makes."""
    return jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))
