"""One MoE layer as one of many expert-parallel devices computes it, forward and backward in FP8, without the exchange
between them.

Each of 64 devices holds 4 of DeepSeek-V3's 256 experts and has 4,096 tokens. The tokens of all devices send it the rows
for its experts: 64 * 4096 * 8 / 256 = 8,192 per expert. A device computes, between and beside the exchanges:

    its tokens         x + attention(x);  norm, router and choice of experts;  x + shared expert
    rows that arrive   experts, one assignment per row, rows of all experts mixed

The exchange would connect the two. Without it, rows and their gates are inputs; the experts' outputs and the tokens'
gates are outputs with gradients of their own. The sums over a token's experts and the balance loss are left out. The
layer is recomputed as in training (`model/recompute.py`).

DeepSeek's public profile of training (github.com/deepseek-ai/profile-data) spends 94.5 ms of computation on four such
layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from configs import deepseek_v3
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.model.attention import Attention, expanded
from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.model.layers import FeedForward, gain, matrix, rms_norm
from deepseek_jax.model.recompute import keep, recomputed
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.model.router import route, router_scores
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.weights import attach, quantize_weights
from deepseek_jax.parameters import PARAMETERS, P, leaf_name
from deepseek_jax.training.flops import FLOPS_PER_WEIGHT
from pallas_kernels import GROUP

TOTAL, OF_COMPUTATION = 132, 112  # multiprocessors of an H800, and those that compute; the other 20 communicate
TARGET = {  # milliseconds of one layer, as if computation had all multiprocessors
    "name": f"DeepSeek's profile, {OF_COMPUTATION} of {TOTAL} multiprocessors, scaled",
    "version": None,
    "value": round(94.5 / 4 * OF_COMPUTATION / TOTAL, 1),
}


@dataclasses.dataclass(frozen=True)
class Load:
    """The work of one device.

    Raises:
        ValueError: a number is not positive, or `tokens` does not suit FP8.
    """

    tokens: int  # of one sequence
    rows: int  # that arrive for each expert
    local_experts: int  # that live on the device

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value} must be positive")
        if self.tokens % GROUP:
            raise ValueError(
                f"tokens = {self.tokens} must be a multiple of {GROUP}: this many share a scale of the weight gradient"
                " in FP8"
            )


PROFILED = Load(tokens=4096, rows=8192, local_experts=4)


class Outputs(NamedTuple):
    """The results of the layer; their gradients have the same form."""

    y_BSD: jax.Array  # residual stream
    y_WD: jax.Array  # results of the experts, one per row that arrived
    gates_BSK: jax.Array  # of this device's tokens; they travel with the rows


class Inputs(NamedTuple):
    """The inputs of the layer that have a gradient."""

    x_BSD: jax.Array
    rows_WD: jax.Array
    gates_W1: jax.Array


class Layer(nnx.Module):
    """`model.layer.MoELayer` with the routed experts of one device."""

    def __init__(self, config: Config, local_experts: int, rngs: nnx.Rngs):
        model, std = config.model, config.model.init_std
        self.config = config
        self.attention = Attention(model, rngs)
        self.norm_D = gain(model.width)
        self.router_DE = matrix(rngs, "router_DE", (model.width, model.num_experts), std)
        self.shared = FeedForward(model.num_shared_experts * model.expert_hidden, model, rngs)
        self.gate_up_ED2F = matrix(rngs, "gate_up_ED2F", (local_experts, model.width, 2, model.expert_hidden), std)
        self.down_EFD = matrix(rngs, "down_EFD", (local_experts, model.expert_hidden, model.width), model.residual_std)

    def __call__(self, inputs: Inputs, experts_W1: jax.Array) -> Outputs:
        """Return the results. `experts_W1` is the local expert of each row that arrives."""
        model, (x_BSD, rows_WD, gates_W1) = self.config.model, inputs
        positions_BS = jnp.broadcast_to(jnp.arange(x_BSD.shape[1]), x_BSD.shape[:2])
        attend = expanded(self.config.execution, rotary_table(model, positions_BS), None)
        x_BSD = keep(x_BSD + attend(self.attention, x_BSD, None)[0], "middle")
        h_BSD = rms_norm(x_BSD, self.norm_D[...], model.norm_eps)
        with jax.named_scope("route"):
            scores_BSE = router_scores(model, h_BSD, self.router_DE[...])
            _, gates_BSK = route(model, scores_BSE, jnp.zeros((model.num_experts,)))
        experts = {"gate_up_ED2F": self.gate_up_ED2F.get_value(), "down_EFD": self.down_EFD.get_value()}
        y_WD = exchange(
            rows_WD,
            experts_W1,
            gates_W1,
            experts,
            Fp8Experts(),
            transport="local",
            num_experts=experts["down_EFD"].values.shape[0],
            slack=1.0,
        )
        return Outputs(x_BSD + self.shared(h_BSD), y_WD, gates_BSK)


def make_weights(config: Config, load: Load) -> tuple[Any, Any]:
    """Return FP32 weights, and (values, scales) of those that are multiplied in FP8.

    Training quantises weights once per optimizer step, so the layer's time does not include it.
    """
    layer = Layer(config, load.local_experts, nnx.Rngs(params=config.seed))
    weights = nnx.to_pure_dict(nnx.split(layer, nnx.Param)[1])
    mesh = jax.make_mesh((1,) * len(AXES), AXES, (jax.sharding.AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])
    quantize = functools.partial(quantize_weights, num_experts=load.local_experts)
    return weights, jax.jit(jax.shard_map(quantize, mesh=mesh, in_specs=P(), out_specs=P()))(weights)


def make_inputs(config: Config, load: Load) -> tuple[Inputs, Outputs, jax.Array]:
    """Return random inputs, random gradients of the outputs, and the expert of each row.

    Each expert has the same number of rows. Their order is random.
    """
    model, num_rows = config.model, load.rows * load.local_experts
    keys = iter(jax.random.split(jax.random.key(config.seed), 7))

    def normal(*shape, dtype=jnp.bfloat16):
        return jax.random.normal(next(keys), shape, dtype)

    stream, rows = (1, load.tokens, model.width), (num_rows, model.width)
    inputs = Inputs(normal(*stream), normal(*rows), jax.random.uniform(next(keys), (num_rows, 1)))
    gradients = Outputs(
        normal(*stream), normal(*rows), normal(1, load.tokens, model.experts_per_token, dtype=jnp.float32)
    )
    experts_W = jax.random.permutation(
        next(keys), jnp.repeat(jnp.arange(load.local_experts, dtype=jnp.int32), load.rows)
    )
    return inputs, gradients, experts_W[:, None]


def make_step(config: Config, load: Load) -> Callable[..., tuple[Outputs, tuple[Any, Inputs]]]:
    """Return the step: (weights, quantized, inputs, gradients, experts_W1) -> outputs, (gradients of the weights in
    FP32, gradients of the inputs). `config` is resolved, and in FP8.
    """
    abstract = jax.eval_shape(lambda: Layer(config, load.local_experts, nnx.Rngs(params=0)))
    graph = nnx.split(abstract, nnx.Param)[0]

    def step(weights, quantized, inputs, gradients, experts_W1):
        def forward(weights, inputs):
            return nnx.merge(graph, attach(weights, quantized))(inputs, experts_W1)

        outputs, pull = jax.vjp(recomputed(config.execution, forward, scanned=False), weights, inputs)
        return outputs, pull(gradients)

    return step


def yardstick(config: Config, load: Load) -> dict[str, Any] | None:
    """Return the time of a layer in DeepSeek's profile, in ms, or None for any layer but the profiled one."""
    same = config.model == from_config_dict(deepseek_v3.get_config()).model and load == PROFILED
    return TARGET if same else None


def flops(config: Config, load: Load, weights: Any) -> int:
    """Return the FLOPs of products with weights and of causal attention, forward and backward. Recomputation does not
    count.
    """
    model = config.model

    def of_weight(path, w):
        rows = load.rows if PARAMETERS[leaf_name(path)].per_expert else load.tokens
        return w.size * rows if w.ndim > 1 else 0  # norms have gains

    products = sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(of_weight, weights)))
    pairs = load.tokens * load.tokens // 2
    return FLOPS_PER_WEIGHT * (products + pairs * model.num_heads * (model.query_dim + model.value_dim))
