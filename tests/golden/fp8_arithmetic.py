"""DeepSeek-V3's FP8 restated in torch: stored weights, and transformers' model with its linear layers replaced.

It shares no code with ours.

Weights are stored as E4M3 with one FP32 scale per 128 x 128 block, amax / 448; blocks at the edge are partly filled. An
input is quantised on its way into each linear layer, one token x 128 channels at a time, likewise by amax / 448.
Between them the model is BF16. Where the sources differ there are two versions:

                                   INFERENCE (inference/kernel.py, model.py)    TRAINING (arXiv 2412.19437, section 3.3)
    scales of attention's output
    and of rows sent to experts    amax / 448                                   the next power of two
    amax / 448, x / scale          divisions                                    products with the reciprocals
    SwiGLU                         silu and product each rounded to BF16        FP32 up to the quantisation
    gates, sum of the experts      on the output, BF16 after each addition      on down's input, sum in FP32
    attention scores               BF16, softmax in FP32, then BF16             FP32 (flash attention)

INFERENCE is `attn_impl = "naive"`, in which kv_b is a linear layer as all others. In both, as transformers has it, the
router's product is FP32 (model.py: BF16). Norms are rounded once (F.rms_norm of model.py; transformers rounds before
the gain, too), rotary angles are FP32.

The last bit of a quotient matters: BF16 inputs have so few bits that many lie in the middle between two E4M3 numbers,
6% or more apart.

Matrix products are float64, rounded once to BF16: those of E4M3 are exact, and no sum depends on the order in which a
machine adds.
"""

import contextlib
import dataclasses
import math
import re
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

GROUP = 128
LARGEST = 448.0  # of E4M3
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Where the two sources differ."""

    powers_of_two: bool  # scales of attention's output and of rows sent to experts
    reciprocal: bool  # quotients of the quantisation
    fused: bool  # SwiGLU, gates, the experts' sum and attention scores in FP32


INFERENCE = Arithmetic(powers_of_two=False, reciprocal=False, fused=False)
TRAINING = Arithmetic(powers_of_two=True, reciprocal=True, fused=True)

QUANTIZED = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
INTO_RESIDUAL = re.compile(r"\.(o_proj|down_proj)\.weight$")
# layers add little to the stream, as in trained models: the next layer multiplies what rounding changed in this one
RESIDUAL_GAIN = 0.3


def store(
    drawn: dict[str, torch.Tensor], rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Round float32 weights to what a released checkpoint stores, after giving every block a magnitude of its own.

    Args:
        drawn: under the released names.
        rng: draws each block's factor, half to two.

    Returns:
        the checkpoint's tensors, and float32 weights: E4M3 times scale, or the BF16 number.
    """
    stored, dequantized = {}, {}
    for name, weight in drawn.items():
        if QUANTIZED.search(name):
            factors = torch.from_numpy(2.0 ** rng.uniform(-1, 1, [-(-size // GROUP) for size in weight.shape])).float()
            factors *= RESIDUAL_GAIN if INTO_RESIDUAL.search(name) else 1.0
            values, scales = quantize_blocks(weight * spread(factors, weight.shape))
            stored |= {name: values, f"{name}_scale_inv": scales}
            dequantized[name] = values.float() * spread(scales, values.shape)
        else:
            stored[name] = weight if name.endswith("e_score_correction_bias") else weight.to(BF16)
            dequantized[name] = stored[name].float()
    return stored, dequantized


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float32 matrix [n, k] as E4M3 and its FP32 scales [ceil(n / 128), ceil(k / 128)]."""
    padded = F.pad(weight, (0, -weight.shape[1] % GROUP, 0, -weight.shape[0] % GROUP))
    blocks = padded.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))  # [n / 128, 128, k / 128, 128]
    scales = blocks.abs().amax((1, 3)) / LARGEST
    values = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(E4M3)
    return values[: weight.shape[0], : weight.shape[1]].contiguous(), scales


def spread(scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return the scale of every element of a matrix of `shape`."""
    return scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)[: shape[0], : shape[1]]


def quantize_tiles(x: torch.Tensor, power_of_two: bool, reciprocal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [..., k] as E4M3 numbers [..., k / 128, 128] and their scales [..., k / 128, 1]."""
    tiles = x.float().unflatten(-1, (-1, GROUP))
    amax = tiles.abs().amax(-1, keepdim=True)
    scales = amax * torch.tensor(1 / LARGEST) if reciprocal else amax / LARGEST
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # scales = mantissa * 2^exponent, 0.5 <= mantissa < 1
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    return (tiles * (1 / scales) if reciprocal else tiles / scales).to(E4M3), scales


class Linear(nn.Module):
    """A linear layer of stored bytes; BF16 out."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, power_of_two: bool, reciprocal: bool):
        super().__init__()
        self.values, self.scales = values, scales
        self.power_of_two, self.reciprocal = power_of_two, reciprocal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantise x [..., k] and multiply: [..., n]."""
        tiles, tile_scales = quantize_tiles(x, self.power_of_two, self.reciprocal)
        segments = self.values.double().unflatten(1, (-1, GROUP))
        partial = torch.einsum("...sk,nsk->...sn", tiles.double(), segments)
        block_scales = self.scales.repeat_interleave(GROUP, 0)[: len(self.values)].T  # [k / 128, n]
        return (partial * tile_scales.double() * block_scales.double()).sum(-2).to(BF16)


class FeedForward(nn.Module):
    """SwiGLU between linear layers of stored bytes: dense, the shared expert, or an expert with gates of its rows."""

    def __init__(self, layers: dict[str, Linear], arithmetic: Arithmetic):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (layers[f"{name}_proj"] for name in ("gate", "up", "down"))
        self.fused = arithmetic.fused

    def forward(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Map [..., D] to [..., D], times `weights` [..., 1]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.fused:
            hidden = F.silu(gate.float()) * up.float()
            return self.down_proj(hidden if weights is None else hidden * weights)
        y = self.down_proj(F.silu(gate) * up)
        return y if weights is None else y * weights.to(BF16)


class Experts(nn.Module):
    """The routed experts, in place of transformers' own."""

    def __init__(self, experts: list[FeedForward], arithmetic: Arithmetic):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.sum_dtype = torch.float32 if arithmetic.fused else BF16

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Return the gated sum over each token's experts [T, D]."""
        y = torch.zeros_like(x, dtype=self.sum_dtype)
        for index, expert in enumerate(self.experts):
            tokens, ranks = torch.where(top_k_index == index)
            y[tokens] += expert(x[tokens], top_k_weights[tokens, ranks, None]).to(self.sum_dtype)
        return y.to(BF16)


class Head(nn.Module):
    """The BF16 head, whose logits stay float32."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] to [..., V]."""
        return (x.double() @ self.weight.double().T).float()


def replace(model: nn.Module, mtp: nn.Module, stored: dict[str, torch.Tensor], arithmetic: Arithmetic) -> None:
    """Make transformers' main model and MTP layers BF16, with linear layers of stored bytes."""

    def linear(name: str, power_of_two: bool = False) -> Linear:
        weight = stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"]
        return Linear(*weight, power_of_two and arithmetic.powers_of_two, arithmetic.reciprocal)

    def feed_forward(name: str, power_of_two: bool = False) -> FeedForward:
        parts = ("gate_proj", "up_proj", "down_proj")
        return FeedForward(
            {part: linear(f"{name}.{part}", power_of_two and part != "down_proj") for part in parts}, arithmetic
        )

    for index, layer in enumerate([*model.model.layers, *(layer.mtp_block for layer in mtp.layers)]):
        name = f"model.layers.{index}"
        for projection in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            setattr(
                layer.self_attn,
                projection,
                linear(f"{name}.self_attn.{projection}", power_of_two=projection == "o_proj"),
            )
        if not hasattr(layer.mlp, "gate"):
            layer.mlp = feed_forward(f"{name}.mlp")
            continue
        count = model.config.n_routed_experts
        layer.mlp.experts = Experts(
            [feed_forward(f"{name}.mlp.experts.{i}", power_of_two=True) for i in range(count)], arithmetic
        )
        layer.mlp.shared_experts = feed_forward(f"{name}.mlp.shared_experts")
    for part in (model, mtp):
        for parameter in part.parameters():
            # what is left is stored in BF16; the selection bias is a buffer and stays FP32
            parameter.data = parameter.data.to(BF16)
    model.lm_head = Head(model.lm_head.weight)


@contextlib.contextmanager
def bf16(arithmetic: Arithmetic):
    """Let what transformers computes between the linear layers round where the sources do."""
    rotate, table = modeling.apply_rotary_pos_emb_interleave, modeling.DeepseekV3RotaryEmbedding.forward

    def norm(self, x):
        x64 = x.double()
        return (x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight.double()).to(
            x.dtype
        )

    def rotated(q, k, cos, sin):
        return tuple(x.to(BF16) for x in rotate(q.float(), k.float(), cos, sin))

    def linear(x, weight, bias=None):
        return (x.double() @ weight.double().T).to(x.dtype)

    def attention(module, query, key, value, mask, scaling, **kwargs):
        wide = torch.float32 if arithmetic.fused else BF16
        scores = ((query.double() @ key.double().mT).to(wide) * scaling).float()
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
        if arithmetic.fused:  # weights are rounded before they are divided by their sum
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            out = (weights.to(BF16).double() @ value.double()) / weights.double().sum(-1, keepdim=True)
        else:
            out = scores.softmax(-1).to(BF16).double() @ value.double()
        return out.to(BF16).transpose(1, 2), None

    def table_in_fp32(self, x, position_ids):
        return table(self, x.float(), position_ids)

    patches = [
        mock.patch.object(modeling.DeepseekV3RMSNorm, "forward", norm),
        mock.patch.object(modeling.DeepseekV3RotaryEmbedding, "forward", table_in_fp32),
        mock.patch.object(modeling, "apply_rotary_pos_emb_interleave", rotated),
        mock.patch.object(modeling, "eager_attention_forward", attention),
        mock.patch.object(F, "linear", linear),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
