"""The linear layers of a model as it runs: the input, the weight and the gradient of the output of each.

The model has no hook for this, and needs none. A training program reaches its weights through `gather`, layer by layer.
Here `gather` also gives each weight a name (`checkpoint_name`, an identity). The program is traced into a jaxpr, where
a linear layer is a product (`dot_general`) whose right operand is such a name. The jaxpr is then run equation by
equation, as `jax.core.eval_jaxpr` would, but for two things: the left operands of these products are kept, and zeros
are added to their results. The gradients by these zeros are the gradients of the outputs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Literal

from deepseek_jax.config import Config
from deepseek_jax.data.packing import Batch
from deepseek_jax.model import transformer
from deepseek_jax.model.precision import ATTENTION_OUTPUT, HIDDEN, Input
from deepseek_jax.parameters import PARAMETERS, Weights, leaf_name
from deepseek_jax.schedule import schedule_value
from deepseek_jax.training.objective import pretraining

MATRICES = ("q_DNQ", "q_a_DA", "kv_a_DC", "q_b_ANQ", "kv_b_CNX", "o_NHD", "gate_up_D2F", "down_FD")
MARK = "linear: "  # begins the names of weights in the jaxpr


class Linear(NamedTuple):
    """One product of the model, taken while it ran."""

    layer: str
    matrix: str
    x_TI: np.ndarray  # BF16
    g_TO: np.ndarray  # BF16
    w_IO: np.ndarray  # FP32

    @property
    def recipe(self) -> Input:
        """How FP8 treats x."""
        return ATTENTION_OUTPUT if self.matrix == "o_NHD" else HIDDEN


def take(config: Config, weights: Weights, batch: Batch) -> list[Linear]:
    """Run a batch forward and backward in BF16; return its linear layers in the order of their products.

    Routed experts are left out: they are not linear layers but grouped products. The loss is the cross entropy per
    token, with that of MTP.

    Args:
        config: resolved.
        weights: as `transformer.init` makes them, on the host.
        batch: one that fits into memory.

    Raises:
        ValueError: the jaxpr does not show every linear layer once.
    """
    config = config.with_(
        execution={"precision": "bf16", "remat": "none", "scan_unroll": config.model.num_layers},
        loss={"z_loss_weight": 0.0},
    )
    program = jax.make_jaxpr(functools.partial(_loss, config, weights.router_bias, batch))(weights.params)
    matrices = _matrices(weights.params)
    found = linear_layers(program)
    if sorted(found) != sorted(matrices):
        raise ValueError(f"the program multiplies by {list(found)}, where each of {list(matrices)} is expected once")

    def tapped(zeros, params):
        return run(program, zeros, *jax.tree.leaves(params))

    zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in found.values()]
    gradients, inputs = jax.jit(jax.grad(tapped, has_aux=True))(zeros, weights.params)
    linears = []
    for name, x, g in zip(found, inputs, gradients, strict=True):
        (layer, matrix), w = name, matrices[name]
        num_inputs = math.prod(w.shape[: PARAMETERS[matrix].input_dims])
        x_TI, g_TO = np.asarray(x).reshape(-1, num_inputs), np.asarray(g).reshape(batch["tokens_BS"].size, -1)
        linears.append(Linear(layer, matrix, x_TI, g_TO, w.reshape(num_inputs, -1)))
    return linears


def _loss(config: Config, router_bias: Any, batch: Any, params: Any) -> jax.Array:
    """Return the cross entropy per token, with that of the MTP layers."""
    objective, segment_ids_BS = pretraining(config), batch["segment_ids_BS"]
    depths = range(config.model.num_mtp_layers)
    following = tuple(transformer.shifted(batch["targets_BS"], depth) for depth in depths)
    rows = batch["tokens_BS"], batch["positions_BS"]
    inputs = transformer.Inputs(*rows, segment_ids_BS > 0, segment_ids_BS, following)
    weights = Weights(params, router_bias)
    output = transformer.apply(config.model, config.execution, weights, inputs, _marking_gather())
    terms = objective.terms(output, params["head_DV"], batch)
    total = terms.loss
    if output.mtp_hidden:
        total += schedule_value(config.loss.mtp_weight, 0.0) * terms.mtp.mean()
    return total / batch["loss_weights_BS"].sum()


def _marking_gather() -> Callable[[Any], Any]:
    """Return a `gather` that casts weights and names those of linear layers; `apply` calls it on one layer after the
    other.
    """
    counts = {"dense": 0, "moe": 0, "mtp": 0}

    def gather(tree):
        kind = "dense" if "ffn" in tree else "moe" if "moe" in tree else "mtp" if "block" in tree else None
        if kind is None:  # embedding and final norm
            return jax.tree_util.tree_map_with_path(_cast, tree)
        layer = f"{kind} {counts[kind]}"
        counts[kind] += 1

        def one(path, w):
            name = leaf_name(path)
            return checkpoint_name(_cast(path, w), f"{MARK}{layer}, {name}") if name in MATRICES else _cast(path, w)

        return jax.tree_util.tree_map_with_path(one, tree)

    return gather


def _cast(path: Any, w: jax.Array) -> jax.Array:
    """Return a weight in BF16 if it is multiplied in BF16; `parallel.weights.gather` does the same on one device."""
    return w.astype(jnp.bfloat16) if w.ndim > 1 and PARAMETERS[leaf_name(path)].precision != "fp32" else w


def _matrices(params: Any) -> dict[tuple[str, str], np.ndarray]:
    """Return the weight of every linear layer by (layer, matrix)."""
    found = {}
    for kind in ("dense", "moe", "mtp"):
        leaves = jax.tree_util.tree_leaves_with_path(params.get(f"{kind}_layers", {}))
        for path, stacked in leaves:
            name = leaf_name(path)
            if name in MATRICES:
                found |= {(f"{kind} {layer}", name): w for layer, w in enumerate(stacked)}
    return found


def _marked_products(program: ClosedJaxpr) -> dict[int, tuple[str, str]]:
    """Return (layer, matrix) of the equations that multiply by a named weight, by the number of the equation."""
    names, products = {}, {}
    for number, equation in enumerate(program.jaxpr.eqns):
        name = equation.params.get("name")
        if isinstance(name, str) and name.startswith(MARK):
            names[equation.outvars[0]] = tuple(name.removeprefix(MARK).split(", "))
        elif equation.primitive.name == "dot_general" and equation.invars[1] in names:
            products[number] = names[equation.invars[1]]
    return products


def linear_layers(program: ClosedJaxpr) -> dict[tuple[str, str], Any]:
    """Return the shape and dtype of the output of every linear layer, by (layer, matrix), in the program's order."""
    found = {}
    for number, name in _marked_products(program).items():
        if name in found:
            raise ValueError(f"{name} is multiplied twice")
        found[name] = program.jaxpr.eqns[number].outvars[0].aval
    return found


def run(program: ClosedJaxpr, zeros: list[jax.Array], *arguments: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Run `program`, whose one result is a loss, with `zeros` added to the outputs of its linear layers.

    Returns:
        the loss, and the inputs of the linear layers.
    """
    jaxpr, products = program.jaxpr, _marked_products(program)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments], strict=True))

    def value(var):
        return var.val if isinstance(var, Literal) else values[var]

    inputs = []
    for number, equation in enumerate(jaxpr.eqns):
        operands = [value(var) for var in equation.invars]
        results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
        results = list(results) if equation.primitive.multiple_results else [results]
        if number in products:
            results[0] += zeros[len(inputs)]
            inputs.append(operands[0])
        values |= zip(equation.outvars, results, strict=True)
    return value(jaxpr.outvars[0]), inputs
