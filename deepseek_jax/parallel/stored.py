"""Where weights lie between steps, in whatever form: FP32, BF16, FP8 with scales, with adapters beside them."""

from typing import Any

import jax

from deepseek_jax.parameters import (
    EXPERTS,
    PARAMETERS,
    Fp8Weight,
    P,
    Weights,
    leaf_name,
    num_lead_dims,
    partition_specs,
)


def stored_specs(weights: Weights) -> Any:
    """Return the layouts of weights as they lie between steps; biases lie whole on every device."""
    return Weights(param_specs(weights.params), jax.tree.map(lambda _: P(), weights.router_bias))


def param_specs(params: Any) -> Any:
    """Return the layouts of parameters, of which any may be in FP8 or have an adapter.

    A scale is of a block of whole matrices, so scales lie where the experts are, or on every device.
    """

    def spec(path, w):
        name = leaf_name(path)
        if not isinstance(w, Fp8Weight):
            return partition_specs({name: w})[name]
        values = partition_specs({name: w.values})[name]
        lead = num_lead_dims(name, w.values.ndim)
        scales: Any = P(*(None,) * (lead - 1), EXPERTS) if PARAMETERS[name].per_expert else P()
        return Fp8Weight(None, values, scales)

    return jax.tree_util.tree_map_with_path(spec, params, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
