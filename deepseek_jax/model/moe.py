"""DeepSeekMoE: the router, the routed experts behind the exchange, and the shared expert (DeepSeek-V3 section 2.1.2,
eq. 12-16).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import Config
from deepseek_jax.model.balance import router_stats
from deepseek_jax.model.experts import expert_ffn
from deepseek_jax.model.experts_fp8 import expert_ffn_fp8
from deepseek_jax.model.experts_grouped import expert_ffn_grouped
from deepseek_jax.model.layers import FeedForward, gain, matrix, rms_norm
from deepseek_jax.model.router import route, router_scores
from deepseek_jax.parallel.expert import exchange
from deepseek_jax.parameters import Fp8Weight

Observer = Callable[[Config, jax.Array, jax.Array, jax.Array], Any]


class RouterBias(nnx.Variable):
    """The selection bias. A variable type of its own: Optax, weight decay, clipping and averaging never see it."""


class MoE(nnx.Module):
    """The feed-forward half of an MoE layer, norm included."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model, std = config.model, config.model.init_std
        self.config = config
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
        self, x_BSD: jax.Array, valid_BS: jax.Array, observe: Observer = router_stats
    ) -> tuple[jax.Array, Any]:
        """Map [B, S, D] to [B, S, D] (the caller adds the residual). Padding (`valid_BS` False) reaches no routed
        expert.

        Beside it, what `observe` makes of config, scores [B, S, E], chosen experts [B, S, K] and `valid_BS`.
        """
        config = self.config
        h_BSD = rms_norm(x_BSD, self.norm_D[...], config.model.norm_eps)
        with jax.named_scope("route"):
            scores_BSE = router_scores(config.model, h_BSD, self.router_DE[...])
            experts_BSK, gates_BSK = route(config.model, scores_BSE, self.bias_E[...])
            observed = observe(config, scores_BSE, experts_BSK, valid_BS)
            experts_BSK = jnp.where(valid_BS[..., None], experts_BSK, config.model.num_experts)
        out_BSD = self._routed(h_BSD, experts_BSK, gates_BSK)
        if config.model.num_shared_experts:
            out_BSD += self.shared(h_BSD)
        return out_BSD, observed

    def routed_experts(self, x_BSD: jax.Array) -> jax.Array:
        """The routed experts' indices [B, S, K] for a residual stream: what tests and notebooks look at."""
        h_BSD = rms_norm(x_BSD, self.norm_D[...], self.config.model.norm_eps)
        return route(self.config.model, router_scores(self.config.model, h_BSD, self.router_DE[...]), self.bias_E[...])[
            0
        ]

    def _routed(self, h_BSD: jax.Array, experts_BSK: jax.Array, gates_BSK: jax.Array) -> jax.Array:
        execution, model = self.config.execution, self.config.model
        y_TD = exchange(
            h_BSD.reshape(-1, model.width),
            experts_BSK.reshape(-1, model.experts_per_token),
            gates_BSK.reshape(-1, model.experts_per_token),
            {"gate_up_ED2F": self.gate_up_ED2F.get_value(), "down_EFD": self.down_EFD.get_value()},
            _expert_fn(execution.experts, execution.expert_block, execution.expert_wave),
            transport=execution.exchange,
            num_experts=model.num_experts,
            slack=execution.exchange_slack,
        )
        return y_TD.reshape(h_BSD.shape)


@functools.cache
def _expert_fn(experts: str, block: int, wave: int):
    """The experts' arithmetic. One function object per choice: the exchange's derivative has it as static."""

    def expert_fn(weights, x_TD, gates_TK, experts_TK):
        if isinstance(weights["down_EFD"], Fp8Weight):
            return expert_ffn_fp8(weights, x_TD, gates_TK, experts_TK)
        if experts == "grouped":
            return expert_ffn_grouped(weights, x_TD, gates_TK, experts_TK)
        return expert_ffn(weights, x_TD, gates_TK, experts_TK, block=block, wave=wave)

    return expert_fn
