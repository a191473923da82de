"""DeepSeekMoE: router, exchange, routed experts and shared expert (DeepSeek-V3 section 2.1.2, eq. 12-16)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.adapters import Adapted, base_of, shape_of
from deepseek_jax.config import Execution, Model
from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.experts_adapted import AdaptedExperts
from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_decode import expert_decode
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.model.experts_grouped import GroupedExperts
from deepseek_jax.model.layers import FeedForward, gain, matrix, rms_norm
from deepseek_jax.model.rounds import Experts
from deepseek_jax.model.router import Replay, route, router_scores, rule_of, weigh
from deepseek_jax.parameters import CastWeight, Fp8Weight
from pallas_kernels.quantized import Quantized
from pallas_kernels.routing import route as route_tokens
from pallas_kernels.routing.reference import choose
from pallas_kernels.routing.rule import Routing

FEW_TOKENS = 512  # of a decoding step: up to them the time is that of reading the experts' weights
# The same of prompts on Hopper. In BF16 it still takes less time at 2,048 (673 us of an MoE, grouped products 717;
# log.md), which was measured once; in FP8 the two were not compared above 512.
FEW_OF_PROMPTS = {"bf16": 1024, "fp8": 512, "fp32": 0}
IN_BLOCKS = "in blocks"  # of `execution.experts`: in blocks, however few tokens a call over a cache has

# (model, scores [B, S, E], chosen experts [B, S, K], valid_BS) -> what to report of a router: sums over rows
Observer = Callable[[Model, jax.Array, jax.Array, jax.Array], Any]


def unobserved(model: Model, scores_BSE: jax.Array, experts_BSK: jax.Array, valid_BS: jax.Array) -> None:
    """Report nothing."""


def chosen_experts(model: Model, scores_BSE: jax.Array, experts_BSK: jax.Array, valid_BS: jax.Array) -> jax.Array:
    """Report the experts of each token, the best first, in the smallest type; those of padding mean nothing."""
    return experts_BSK.astype(jnp.uint8 if model.num_experts <= 256 else jnp.uint16)


class RouterBias(nnx.Variable):
    """The selection bias. It has its own variable type, so Optax, weight decay, clipping and averaging never see it."""


class MoE(nnx.Module):
    """The feed-forward half of an MoE layer, norm included.

    Where decoding has all experts on one device, not in FP32, the shared expert lies behind the routed ones, as experts
    that every token has: it is read with them, in no product of its own.
    """

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
        return self.normed(execution, rms_norm(x_BSD, self.norm_D[...], self.model.norm_eps), valid_BS, observe)

    def normed(
        self, execution: Execution, h_BSD: jax.Array, valid_BS: jax.Array, observe: Observer
    ) -> tuple[jax.Array, Any]:
        """Do as a call behind its norm."""
        model = self.model
        if execution.experts == "few":
            parts_XTD, observed = self.few(h_BSD, valid_BS, observe)
            out_BSD = parts_XTD.sum(0).astype(h_BSD.dtype).reshape(h_BSD.shape)
        else:
            with jax.named_scope("route"):
                scores_BSE = router_scores(model, h_BSD, self.router_DE[...])
                experts_BSK, gates_BSK, watched_BSK = self._route(scores_BSE)
                observed = observe(model, scores_BSE, watched_BSK, valid_BS)
                experts_BSK = jnp.where(valid_BS[..., None], experts_BSK, model.num_experts)
            out_BSD = self._routed(execution, h_BSD, experts_BSK, gates_BSK)
        if model.num_shared_experts:
            out_BSD += self.shared(h_BSD)
        return out_BSD, observed

    def _route(self, scores_BSE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return experts and gates, and the experts that an observer sees."""
        bias = self.bias_E.get_value()
        if not isinstance(bias, Replay):
            experts_BSK, gates_BSK = route(self.model, scores_BSE, bias)
            return experts_BSK, gates_BSK, experts_BSK
        assert bias.bias_E is not None
        own_BSK, _ = route(self.model, scores_BSE, bias.bias_E)
        experts_BSK = bias.over(own_BSK)
        return experts_BSK, weigh(self.model, scores_BSE, experts_BSK), own_BSK if bias.watches else experts_BSK

    def few(
        self,
        h_BSD: jax.Array,
        valid_BS: jax.Array,
        observe: Observer,
        rows: Quantized | None = None,
        zeros: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Return FP32 parts [parts, T, D] of the routed experts' sums, and what `observe` reports of the router.

        For a decoding step, whose tokens and experts are all here.

        Args:
            h_BSD: behind the norm.
            valid_BS: False on padding.
            observe: what to report.
            rows: `h_BSD` in tiles for experts in FP8, where there are any.
            zeros: for the marks of the router's kernel (`pallas_kernels.routing`).
        """
        weights = {"gate_up_ED2F": self.gate_up_ED2F.get_value(), "down_EFD": self.down_EFD.get_value()}
        h_TD = h_BSD.reshape(-1, self.model.width)
        num_experts = _num_experts(weights["down_EFD"])
        with jax.named_scope("route"):
            experts_TK, gates_TK, scores_TE, dense = self._route_few(h_TD, valid_BS.reshape(-1), num_experts, zeros)
            routed_TK = experts_TK[:, : self.model.experts_per_token]  # without those that every token has
            scores_BSE, routed_BSK = (x.reshape(*valid_BS.shape, -1) for x in (scores_TE, routed_TK))
            observed = observe(self.model, scores_BSE, routed_BSK, valid_BS)
        with jax.named_scope("experts"):
            options = {"dense": dense, "rows": rows, "everybody": num_experts - self.model.num_experts}
            return expert_decode(h_TD, experts_TK, gates_TK, weights, **options), observed

    def _route_few(
        self, h_TD: jax.Array, valid_T: jax.Array, num_experts: int, zeros: jax.Array | None = None
    ) -> Routing:
        """Return the routing of a decoding step: of a router in BF16 parts by the kernel, in FP32 from its scores."""
        rule, router, bias_E = rule_of(self.model), self.router_DE[...], self.bias_E[...]
        if router.dtype == h_TD.dtype == jnp.bfloat16:
            return route_tokens(h_TD, router, bias_E, valid_T, rule=rule, num_experts=num_experts, zeros=zeros)
        scores_TE = router_scores(self.model, h_TD, router)
        return Routing(*choose(rule, scores_TE, bias_E, valid_T, num_experts), scores_TE, None)

    def _routed(
        self, execution: Execution, h_BSD: jax.Array, experts_BSK: jax.Array, gates_BSK: jax.Array
    ) -> jax.Array:
        model = self.model
        weights = {"gate_up_ED2F": self.gate_up_ED2F.get_value(), "down_EFD": self.down_EFD.get_value()}
        experts_TK, gates_TK = (x.reshape(-1, model.experts_per_token) for x in (experts_BSK, gates_BSK))
        num_experts = model.num_experts
        if execution.exchange == "local":
            num_experts = _num_experts(weights["down_EFD"])
            experts_TK, gates_TK = _with_shared(model.num_experts, num_experts, experts_TK, gates_TK)
        y_TD = exchange(
            h_BSD.reshape(-1, model.width),
            experts_TK,
            gates_TK,
            weights,
            choose_experts(execution, weights),
            transport=execution.exchange,
            num_experts=num_experts,
            slack=execution.exchange_slack,
            groups=(model.num_groups, model.num_kept_groups),
        )
        return y_TD.reshape(h_BSD.shape)


def _num_experts(down_EFD: jax.Array | CastWeight | Fp8Weight | Adapted) -> int:
    return shape_of(down_EFD)[0]


def _with_shared(
    num_routed: int, num_experts: int, experts_TK: jax.Array, gates_TK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Give each token the experts behind the routed ones, too, with gate 1: where decoding keeps the shared expert."""
    if num_experts == num_routed:
        return experts_TK, gates_TK
    shared = jnp.arange(num_routed, num_experts, dtype=experts_TK.dtype)
    there_T1 = experts_TK[:, :1] < num_routed  # padding has no expert at all
    shared_TK = jnp.where(there_T1, shared, num_experts)
    experts_TK = jnp.where(there_T1, experts_TK, num_experts)
    ones_TK = jnp.ones_like(gates_TK, shape=shared_TK.shape)
    return jnp.concatenate([experts_TK, shared_TK], 1), jnp.concatenate([gates_TK, ones_TK], 1)


def choose_experts(execution: Execution, weights: dict[str, Any]) -> Experts:
    """Return the experts' arithmetic for weights that are in FP8 or not, with adapters or without."""
    inner = _plain_experts(execution, isinstance(base_of(weights["down_EFD"]), Fp8Weight))
    scales = tuple((name, weight.scale) for name, weight in weights.items() if isinstance(weight, Adapted))
    return AdaptedExperts(inner, scales) if scales else inner


def _plain_experts(execution: Execution, in_fp8: bool) -> Fp8Experts | GroupedExperts | BlockedExperts:
    if in_fp8:
        return Fp8Experts()
    if execution.experts == "grouped":
        return GroupedExperts()
    return BlockedExperts(execution.expert_block, execution.expert_wave)
