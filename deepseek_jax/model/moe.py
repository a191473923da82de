"""DeepSeekMoE: router, exchange, routed experts and shared expert (DeepSeek-V3 section 2.1.2, eq. 12-16)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.model.experts_grouped import GroupedExperts
from deepseek_jax.model.layers import FeedForward, gain, matrix, rms_norm
from deepseek_jax.model.rounds import Experts
from deepseek_jax.model.router import route, router_scores
from deepseek_jax.parameters import Fp8Weight

# (model, scores [B, S, E], chosen experts [B, S, K], valid_BS) -> what to report of a router: sums over rows
Observer = Callable[[Model, jax.Array, jax.Array, jax.Array], Any]


def unobserved(model: Model, scores_BSE: jax.Array, experts_BSK: jax.Array, valid_BS: jax.Array) -> None:
    """Report nothing."""


class RouterBias(nnx.Variable):
    """The selection bias. It has its own variable type, so Optax, weight decay, clipping and averaging never see it."""


class MoE(nnx.Module):
    """The feed-forward half of an MoE layer, norm included."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        std = model.init_std
        self.model = model
        self.norm_D = gain(model.width)
        self.router_DE = matrix(rngs, "router_DE", (model.width, model.num_experts), std)
        self.bias_E = RouterBias(jnp.zeros((model.num_experts,), jnp.float32))
        self.gate_up_ED2F = matrix(rngs, "gate_up_ED2F", (model.num_experts, model.width, 2, model.expert_hidden), std)
        self.down_EFD = matrix(
            rngs, "down_EFD", (model.num_experts, model.expert_hidden, model.width), model.residual_std
        )
        if model.num_shared_experts:
            self.shared = FeedForward(model.num_shared_experts * model.expert_hidden, model, rngs)

    def __call__(
        self, execution: Execution, x_BSD: jax.Array, valid_BS: jax.Array, observe: Observer = unobserved
    ) -> tuple[jax.Array, Any]:
        """Return the output [B, S, D], without the residual, and what `observe` reports of the router.

        Padding (`valid_BS` False) reaches no routed expert.
        """
        model = self.model
        h_BSD = rms_norm(x_BSD, self.norm_D[...], model.norm_eps)
        with jax.named_scope("route"):
            scores_BSE = router_scores(model, h_BSD, self.router_DE[...])
            experts_BSK, gates_BSK = route(model, scores_BSE, self.bias_E[...])
            observed = observe(model, scores_BSE, experts_BSK, valid_BS)
            experts_BSK = jnp.where(valid_BS[..., None], experts_BSK, model.num_experts)
        out_BSD = self._routed(execution, h_BSD, experts_BSK, gates_BSK)
        if model.num_shared_experts:
            out_BSD += self.shared(h_BSD)
        return out_BSD, observed

    def _routed(
        self, execution: Execution, h_BSD: jax.Array, experts_BSK: jax.Array, gates_BSK: jax.Array
    ) -> jax.Array:
        model = self.model
        weights = {"gate_up_ED2F": self.gate_up_ED2F.get_value(), "down_EFD": self.down_EFD.get_value()}
        y_TD = exchange(
            h_BSD.reshape(-1, model.width),
            experts_BSK.reshape(-1, model.experts_per_token),
            gates_BSK.reshape(-1, model.experts_per_token),
            weights,
            choose_experts(execution, isinstance(weights["down_EFD"], Fp8Weight)),
            transport=execution.exchange,
            num_experts=model.num_experts,
            slack=execution.exchange_slack,
            groups=(model.num_groups, model.num_kept_groups),
        )
        return y_TD.reshape(h_BSD.shape)


def choose_experts(execution: Execution, in_fp8: bool) -> Experts:
    """Return the experts' arithmetic for weights that are in FP8 or not."""
    if in_fp8:
        return Fp8Experts()
    if execution.experts == "grouped":
        return GroupedExperts()
    return BlockedExperts(execution.expert_block, execution.expert_wave)
