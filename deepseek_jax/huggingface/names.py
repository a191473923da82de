"""Every tensor of a Hugging Face checkpoint, and the part of our parameter tree that it fills.

Import, export and the check that nothing is left over all derive from this one table. A checkpoint stores a linear
weight as [out, in]. Ours is [in, out], and heads, halves of a gated FFN, layers and experts have dims of their own:

    stored                                          fills
    embed_tokens         [V, D]                     embed_VD        as it is
    lm_head              [V, D]                     head_DV
    q_a_proj             [A, D]                     q_a_DA
    q_b_proj             [(N Q), A]                 q_b_ANQ         a head's Q rows: P content rows, then R rotary rows
    q_proj               [(N Q), D]                 q_DNQ           where there is no query latent
    kv_a_proj_with_mqa   [C + R, D]                 kv_a_DC         latent rows, then those of the shared rotary key
    kv_b_proj            [(N X), C]                 kv_b_CNX        a head's X rows: P content rows, then H value rows
    o_proj               [D, (N H)]                 o_NHD
    gate_proj, up_proj   [F, D] each                gate_up_D2F     gate is half 0, up is half 1
    down_proj            [D, F]                     down_FD
    mlp.gate             [E, D]                     router_DE
    eh_proj              [D, (2 D)]                 merge_2DD       columns: embedding first, hidden state second

So every matrix except the embedding fills its leaf transposed; vectors and the embedding fill theirs as they are
(`slices`). Rotary rows keep the checkpoint's order, interleaved pairs. Layers from `num_layers` on are MTP layers. Each
repeats the embedding and the head with the same values (DeepSeek-V3's README_WEIGHTS calls them shared).

In the released FP8 form every linear layer is F8_E4M3. Its multipliers, FP32 and one per block of 128 x 128, have the
name of the weight and `_scale_inv`. Router, `eh_proj`, embedding, head and norms are BF16, the selection bias is FP32.
A softmax gate (V2) has no selection bias: no tensor fills its leaf `bias_E`, which stays zero.
"""

import dataclasses
import math
from typing import NamedTuple

from deepseek_jax.config import Model
from deepseek_jax.parameters import PARAMETERS
from pallas_kernels import GROUP

FP8, BF16, FP32 = "F8_E4M3", "BF16", "F32"
SCALES = "scales"  # name of the array beside the values of a leaf in FP8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint.

    Attributes:
        name: in the checkpoint, "model.layers.3.mlp.experts.17.gate_proj.weight".
        shape: as stored, [out, in] for matrices.
        quantized: whether it is F8_E4M3, with scales beside it, in the released FP8 form.
        dtype: in the released FP8 form, by safetensors' name: "F8_E4M3", "BF16" or "F32".
        leaf: path in {"params": ..., "router_bias": ...}.
        index: which element of the leaf's leading dims it fills: (), (layer,) or (layer, expert).
        half: which half of the dim "2" of a `gate_up` it fills: 0 for gate, 1 for up; None for other tensors.
        copied: whether it is an MTP layer's copy of the embedding or the head; `leaf` is the shared one.
    """

    name: str
    shape: tuple[int, ...]
    quantized: bool
    dtype: str
    leaf: tuple[str, ...]
    index: tuple[int, ...]
    half: int | None
    copied: bool

    @property
    def scale_name(self) -> str:
        """Name of the scales. They multiply the values, although they are called inverse."""
        return f"{self.name}_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Blocks of 128 x 128 along each dim; those at the edges may be partly filled."""
        out_dim, in_dim = self.shape
        return math.ceil(out_dim / GROUP), math.ceil(in_dim / GROUP)

    @property
    def transposed(self) -> bool:
        """Whether the tensor fills its leaf transposed: matrices that are multiplied do, and their scales."""
        return len(self.shape) == 2 and (self.leaf[-1] == SCALES or PARAMETERS[self.leaf[-1]].input_dims > 0)

    @property
    def row_dims(self) -> int:
        """How many dims of the leaf are the rows of its matrix."""
        return 1 if self.leaf[-1] == SCALES else PARAMETERS[self.leaf[-1]].row_dims

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix in the leaf: [in, out]; [V, D] of the embedding; a vector is one column."""
        rows, columns = self.shape[::-1] if self.transposed else (*self.shape, 1)[:2]
        return rows, columns

    @property
    def scales(self) -> "Tensor":
        """The tensor of the scales. They fill an array beside the values, and are transposed like these."""
        return dataclasses.replace(
            self, name=self.scale_name, shape=self.scale_shape, quantized=False, dtype=FP32, leaf=(*self.leaf, SCALES)
        )


def tensors(model: Model) -> list[Tensor]:
    """Return all tensors but scales, in the released order: embedding, layers, final norm, head, MTP layers."""
    listed = [_top("model.embed_tokens", model, "embed_VD")]
    listed += _layers(range(model.num_dense_layers), model, ("dense_layers",), _DENSE)
    listed += _layers(range(model.num_dense_layers, model.num_layers), model, ("moe_layers",), _MOE)
    listed += [_top("model.norm", model, "final_norm_D"), _top("lm_head", model, "head_DV")]
    for depth in range(model.num_mtp_layers):
        layer = model.num_layers + depth
        listed.append(_top(f"model.layers.{layer}.embed_tokens", model, "embed_VD", copied=True))
        listed += _rows(_MTP, layer, model, ("mtp_layers",), depth)
        listed += _rows(_MOE, layer, model, ("mtp_layers", "block"), depth)
        listed.append(_top(f"model.layers.{layer}.shared_head.head", model, "head_DV", copied=True))
    return listed


def num_tensors(model: Model) -> int:
    """Return how many tensors `tensors` lists, without a list of them."""

    def count(rows: "tuple[_Row, ...]") -> int:
        return sum(model.num_experts if "{expert}" in row.name else 1 for row in rows if _exists(row, model))

    moe, mtp = count(_MOE), count(_MTP) + 2
    dense = count(_DENSE)
    return 3 + model.num_dense_layers * dense + model.num_moe_layers * moe + model.num_mtp_layers * (mtp + moe)


class _Row(NamedTuple):
    """One kind of tensor in a layer, or in each expert if its name has "{expert}"; `shape` has keys of `_sizes`."""

    name: str
    leaf: str
    shape: str
    half: int | None = None

    @property
    def dtype(self) -> str:
        """Dtype in the released FP8 form: the selection bias is FP32, the rest BF16 unless it is multiplied in FP8."""
        parameter = PARAMETERS[self.leaf.split()[-1]]
        if parameter.precision == "fp8":
            return FP8
        return FP32 if parameter.keeps_fp32 and not parameter.input_dims else BF16


_ATTENTION = (
    _Row("input_layernorm", "attention norm_D", "D"),
    _Row("self_attn.q_proj", "attention q_DNQ", "NQ D"),
    _Row("self_attn.q_a_proj", "attention q_a_DA", "A D"),
    _Row("self_attn.q_a_layernorm", "attention q_norm_A", "A"),
    _Row("self_attn.q_b_proj", "attention q_b_ANQ", "NQ A"),
    _Row("self_attn.kv_a_proj_with_mqa", "attention kv_a_DC", "C+R D"),
    _Row("self_attn.kv_a_layernorm", "attention kv_norm_C", "C"),
    _Row("self_attn.kv_b_proj", "attention kv_b_CNX", "NX C"),
    _Row("self_attn.o_proj", "attention o_NHD", "D NH"),
)
_DENSE = (
    *_ATTENTION,
    _Row("post_attention_layernorm", "ffn norm_D", "D"),
    _Row("mlp.gate_proj", "ffn gate_up_D2F", "dense D", half=0),
    _Row("mlp.up_proj", "ffn gate_up_D2F", "dense D", half=1),
    _Row("mlp.down_proj", "ffn down_FD", "D dense"),
)
_MOE = (
    *_ATTENTION,
    _Row("post_attention_layernorm", "moe norm_D", "D"),
    _Row("mlp.gate", "moe router_DE", "E D"),
    _Row("mlp.gate.e_score_correction_bias", "moe bias_E", "E"),
    _Row("mlp.experts.{expert}.gate_proj", "moe gate_up_ED2F", "expert D", half=0),
    _Row("mlp.experts.{expert}.up_proj", "moe gate_up_ED2F", "expert D", half=1),
    _Row("mlp.experts.{expert}.down_proj", "moe down_EFD", "D expert"),
    _Row("mlp.shared_experts.gate_proj", "moe shared gate_up_D2F", "shared D", half=0),
    _Row("mlp.shared_experts.up_proj", "moe shared gate_up_D2F", "shared D", half=1),
    _Row("mlp.shared_experts.down_proj", "moe shared down_FD", "D shared"),
)
_MTP = (
    _Row("enorm", "embed_norm_D", "D"),
    _Row("hnorm", "hidden_norm_D", "D"),
    _Row("eh_proj", "merge_2DD", "D 2D"),
    _Row("shared_head.norm", "final_norm_D", "D"),
)


# Leaves that gate and up share: a column of their matrix belongs to one of two halves.
HALVED = frozenset(row.leaf.split()[-1] for row in (*_DENSE, *_MOE) if row.half is not None)


def _sizes(model: Model) -> dict[str, int]:
    """Return sizes of stored dims in the letters of the package; 0 where the model has no such part."""
    return {
        "D": model.width,
        "2D": 2 * model.width,
        "A": model.query_latent,
        "C": model.kv_latent,
        "C+R": model.kv_latent + model.rotary_dim,
        "NQ": model.num_heads * model.query_dim,
        "NX": model.num_heads * (model.content_dim + model.value_dim),
        "NH": model.num_heads * model.value_dim,
        "E": model.num_experts,
        "dense": model.dense_hidden,
        "expert": model.expert_hidden,
        "shared": model.num_shared_experts * model.expert_hidden,
    }


def _exists(row: _Row, model: Model) -> bool:
    if row.leaf.endswith("q_DNQ"):
        return not model.query_latent
    if row.leaf.endswith("bias_E"):
        return model.gate == "sigmoid"
    return all(_sizes(model)[size] for size in row.shape.split())


def _top(name: str, model: Model, leaf: str, copied: bool = False) -> Tensor:
    shape = (model.width,) if leaf == "final_norm_D" else (model.vocab_size, model.width)
    return Tensor(f"{name}.weight", shape, False, BF16, ("params", leaf), (), None, copied)


def _layers(layers: range, model: Model, stack: tuple[str, ...], rows: tuple[_Row, ...]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in _rows(rows, layer, model, stack, layer - layers.start)]


def _rows(rows: tuple[_Row, ...], layer: int, model: Model, stack: tuple[str, ...], depth: int) -> list[Tensor]:
    """Return the tensors of the checkpoint's layer `layer`, number `depth` of its stack; experts one after another."""
    sizes, listed = _sizes(model), []

    def add(row: _Row, index: tuple[int, ...]) -> None:
        bias = row.dtype == FP32
        name = row.name.format(expert=index[-1]) + ("" if bias else ".weight")
        shape = tuple(sizes[size] for size in row.shape.split())
        leaf = ("router_bias" if bias else "params", *stack, *row.leaf.split())
        listed.append(
            Tensor(f"model.layers.{layer}.{name}", shape, row.dtype == FP8, row.dtype, leaf, index, row.half, False)
        )

    kept = [row for row in rows if _exists(row, model)]
    per_expert = [row for row in kept if "{expert}" in row.name]
    for row in kept:
        if row not in per_expert:
            add(row, (depth,))
    for expert in range(model.num_experts if per_expert else 0):
        for row in per_expert:
            add(row, (depth, expert))
    return listed
