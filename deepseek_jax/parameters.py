"""One row per parameter: where it lies, which dims a product sums over, and in which precision it is multiplied.

A parameter's name says its dims and is the key of its row. Everything else derives from the row: the layout
of the parameter, its gradient, its moments and its average (`partition_specs`); which weights are quantised, and as
which matrix (`parallel.weights`); which devices store the same part where a mesh does not divide a dim (`layout_of`);
weight decay (`training.optimizer`); what decoding casts (`inference.weights`); how a checkpoint's tensors lie in our
arrays (`huggingface`). To add a parameter, add a row here and the module that multiplies with it.

A stack of layers has a leading dim that is in no row, because it is never split.

    stored    q_b_ANQ     [L, A, N, Q]       P(None, TOKENS, None, None)         L matrices [A, (N Q)]
              down_EFD    [L, E, F, D]       P(None, STORED_EXPERTS, None, None)  L x E matrices [F, D]

Devices that hold the same experts store whole experts each, if there are enough (`stores_whole_experts`): what they
gather and reduce is then contiguous. Otherwise they split every expert, by the layout of its row.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

P = jax.P
ROWS = ("data", "node", "expert")  # mesh axes: every batch dim is split over these
CONTEXT = "context"  # mesh axis: devices along it share the tokens of the same rows (`parallel.context`)
TOKENS = ("data", CONTEXT, "node", "expert")  # mesh axes: tokens are split over these, and weights stored over them
EXPERTS = ("node", "expert")  # mesh axes that hold the routed experts
COPIES = ("data", CONTEXT)  # mesh axes along which devices hold the same experts
STORED_EXPERTS = (*EXPERTS, *COPIES)  # mesh axes over which whole experts are stored
PIPE = "pipe"  # mesh axis of a pipeline's devices; it splits weights for storage, too (`parallel.stage_weights`)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What the name of a parameter alone tells.

    Attributes:
        layout: mesh axes of each dim of the name. A weight is whole while it is multiplied, so all axes but `EXPERTS`
            split it for storage only. Of experts, where devices cannot store whole ones.
        input_dims: how many dims of one matrix a product sums over: its rows. 0: no product (a lookup, a gain, a bias).
        precision: of its products: "fp8" (in an FP8 run, else as "compute"), "compute" (BF16, or FP32 in an FP32 run)
            or "fp32".
        per_expert: the first dim is experts; each has a matrix of its own.
        keeps_fp32: stays FP32 even when a checkpoint is loaded for use without training.
    """

    layout: P
    input_dims: int
    precision: Literal["fp8", "compute", "fp32"]
    per_expert: bool = False
    keeps_fp32: bool = False

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies: to matrices and the embedding, not to norm gains."""
        return len(self.layout) > 1

    @property
    def matrix_dims(self) -> int:
        """How many of the last dims are one matrix."""
        return len(self.layout) - self.per_expert

    @property
    def row_dims(self) -> int:
        """How many dims are the rows of the matrix; a vector is one column, an embedding has a row per token."""
        return max(self.input_dims, 1)


PARAMETERS = {
    "embed_VD": Parameter(P(None, TOKENS), 0, "fp32"),
    "head_DV": Parameter(P(TOKENS, None), 1, "compute"),
    "q_DNQ": Parameter(P(TOKENS, None, None), 1, "fp8"),
    "q_a_DA": Parameter(P(TOKENS, None), 1, "fp8"),
    "q_b_ANQ": Parameter(P(TOKENS, None, None), 1, "fp8"),
    "kv_a_DC": Parameter(P(TOKENS, None), 1, "fp8"),
    "kv_b_CNX": Parameter(P(TOKENS, None, None), 1, "fp8"),
    "o_NHD": Parameter(P(None, None, TOKENS), 2, "fp8"),
    "gate_up_D2F": Parameter(P(TOKENS, None, None), 1, "fp8"),
    "down_FD": Parameter(P(None, TOKENS), 1, "fp8"),
    "router_DE": Parameter(P(TOKENS, None), 1, "fp32", keeps_fp32=True),
    "gate_up_ED2F": Parameter(P(EXPERTS, COPIES, None, None), 1, "fp8", per_expert=True),
    "down_EFD": Parameter(P(EXPERTS, None, COPIES), 1, "fp8", per_expert=True),
    "merge_2DD": Parameter(P(None, None, TOKENS), 2, "compute"),
    # Small enough to lie on every device.
    "norm_D": Parameter(P(None), 0, "fp32"),
    "q_norm_A": Parameter(P(None), 0, "fp32"),
    "kv_norm_C": Parameter(P(None), 0, "fp32"),
    "embed_norm_D": Parameter(P(None), 0, "fp32"),
    "hidden_norm_D": Parameter(P(None), 0, "fp32"),
    "final_norm_D": Parameter(P(None), 0, "fp32"),
    "bias_E": Parameter(P(None), 0, "fp32", keeps_fp32=True),
    # Adapters of rank U, beside weights that stay as they are (`adapters`); in, I, and out, O, are flat.
    "lora_a_IU": Parameter(P(None, None), 1, "fp32"),
    "lora_b_UO": Parameter(P(None, None), 1, "fp32"),
    "lora_a_EIU": Parameter(P(EXPERTS, None, None), 1, "fp32", per_expert=True),
    "lora_b_EUO": Parameter(P(EXPERTS, None, None), 1, "fp32", per_expert=True),
}


class Weights(NamedTuple):
    """Everything that a model computes with.

    Attributes:
        params: nested dicts of arrays, or of `Fp8Weight`s where weights are used as a checkpoint stores them.
        router_bias: the selection biases, which the optimizer does not see.
    """

    params: Any
    router_bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """A weight in FP8 with a path for its gradient; a layer finds it in place of an array.

    Attributes:
        carrier: FP32, of the weight's shape. Products return the weight's gradient as the carrier's cotangent and
            never read its numbers. None where nothing is differentiated.
        values: E4M3, of the weight's shape.
        scales: FP32 [..., ceil(in / 128), ceil(out / 128)] of the blocks of the matrix [in, out].
    """

    carrier: jax.Array | None
    values: jax.Array
    scales: jax.Array

    def as_matrix(self, input_dims: int = 1, stacked: int = 0) -> "Fp8Weight":
        """Return the weight as a matrix [in, out]; the `stacked` dims before it stay."""
        shape = matrix_shape(self.values.shape, stacked, input_dims)
        carrier = None if self.carrier is None else self.carrier.reshape(shape)
        return Fp8Weight(carrier, self.values.reshape(shape), self.scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TurnedFp8Weight:
    """An `Fp8Weight` as decoding keeps it: each matrix [out, in], because tensor cores sum over the last dim.

    A product asks for [out, in]; from weights that are stored [in, out] the program would make it anew at every step.

    Attributes:
        values: E4M3 [..., out, in].
        scales: FP32 [..., ceil(out / 128), ceil(in / 128)].
        shape: of the weight, [..., *in, *out].
    """

    values: jax.Array
    scales: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, weight: Fp8Weight, input_dims: int, stacked: int = 0) -> "TurnedFp8Weight":
        """Turn the matrices of a weight; the `stacked` dims before them stay."""
        matrix = weight.as_matrix(input_dims, stacked)
        return cls(matrix.values.swapaxes(-1, -2), matrix.scales.swapaxes(-1, -2), weight.values.shape)

    def restored(self) -> Fp8Weight:
        """Return the weight; XLA drops this turn together with that of the product."""
        lead = self.values.shape[:-2]  # on a device its part of them
        values = self.values.swapaxes(-1, -2).reshape(*lead, *self.shape[len(lead) :])
        return Fp8Weight(None, values, self.scales.swapaxes(-1, -2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CastWeight:
    """A weight in BF16 with a path for its gradient in FP32; in BF16 and FP8 training a layer finds it in place of an
    array that is multiplied.

    A gradient as wide as the weight would be rounded before it is summed over micro-batches and devices.

    Attributes:
        carrier: FP32, of the weight's shape, as that of `Fp8Weight`.
        values: BF16.
    """

    carrier: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, weight: "jax.Array | CastWeight") -> "CastWeight":
        """Return an array as one, too: its gradient is made in FP32 and then cast to its dtype."""
        if isinstance(weight, cls):
            return weight
        return cls(weight.astype(jnp.float32), jax.lax.stop_gradient(weight))


def leaf_name(path: Sequence[Any]) -> str:
    """Return the name of a leaf in `PARAMETERS`, from its tree path (dict keys, or attributes of a module)."""
    for entry in reversed(path):
        name = getattr(entry, "key", getattr(entry, "name", None))
        if name in PARAMETERS:
            return name
    raise KeyError(f"no row of PARAMETERS for {jax.tree_util.keystr(path)}: every parameter needs one")


def stores_whole_experts(num_experts: int) -> bool:
    """Return whether the current mesh has as many parts of `STORED_EXPERTS` as divide the experts."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return num_experts % math.prod(sizes.get(axis, 1) for axis in STORED_EXPERTS) == 0


def widest_layout(name: str, num_dims: int, num_experts: int) -> P:
    """Return the `PartitionSpec` of a leaf of which the current mesh divides every dim.

    Dims of stacked layers come first and are not split.

    Args:
        name, num_dims: of the leaf.
        num_experts: of the model, on all devices; read for experts' weights alone.
    """
    parameter = PARAMETERS[name]
    layout = parameter.layout
    if parameter.per_expert and stores_whole_experts(num_experts):
        layout = P(STORED_EXPERTS, *(None,) * parameter.matrix_dims)
    return P(*(None,) * (num_dims - len(layout)), *layout)


def layout_of(name: str, shape: Sequence[int], num_experts: int) -> P:
    """Return the `PartitionSpec` of a whole leaf on the current mesh: its widest layout, less the axes that do not fit.

    A dim is split over those of its axes that together divide it into the most parts; of two choices with as many, over
    the axes that come later, whose links are faster. Devices along the others store the same part, and sum its
    gradient. On data 3, node 8, expert 8 a width of 7,168 lies in 64 parts, each on three devices. The dim of routed
    experts keeps its axes: a device stores none but those that it multiplies with (`parallel.mesh.check_fit`).
    Devices of a pipeline split the dim of `pipe_dim` before the others, if they divide it.

    Args:
        name, shape: of the leaf, stacked layers first.
        num_experts: of the model, on all devices; read for experts' weights alone.
    """
    widest, lead = widest_layout(name, len(shape), num_experts), len(shape) - len(PARAMETERS[name].layout)
    experts = lead if PARAMETERS[name].per_expert else None
    pipe, dim_of_pipe = jax.sharding.get_abstract_mesh().shape.get(PIPE, 1), pipe_dim(name)

    def entry(dim: int, axes: Any) -> Any:
        if dim == experts:
            return axes
        if pipe > 1 and dim_of_pipe == dim - lead and shape[dim] % pipe == 0:
            return (*axes_of(_fitting(axes, shape[dim] // pipe)), PIPE)
        return _fitting(axes, shape[dim])

    return P(*(entry(dim, axes) for dim, axes in enumerate(widest)))


def pipe_dim(name: str) -> int | None:
    """Return the dim of the name that devices of a pipeline split, too: that of `data`; None: they split none."""
    return next((dim for dim, axes in enumerate(PARAMETERS[name].layout) if "data" in axes_of(axes)), None)


def axes_of(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the mesh axes of one dim of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _fitting(entry: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """Return those axes of an entry that divide a dim of `size` into the most parts."""
    axes, sizes = axes_of(entry), jax.sharding.get_abstract_mesh().shape

    def parts(chosen: Sequence[str]) -> int:
        return math.prod(sizes.get(axis, 1) for axis in chosen)

    if size % parts(axes) == 0:
        return entry
    several = [s for n in range(len(axes), -1, -1) for s in itertools.combinations(reversed(axes), n)]
    chosen = max((s for s in several if size % parts(s) == 0), key=parts)
    return tuple(reversed(chosen)) or None


def layout_in_use(name: str, num_dims: int) -> P:
    """Return the `PartitionSpec` of a leaf while it is multiplied: experts on their devices, all else whole."""
    parameter = PARAMETERS[name]
    lead = (None,) * (num_dims - len(parameter.layout))
    return P(*lead, EXPERTS if parameter.per_expert else None, *(None,) * (len(parameter.layout) - 1))


def partition_specs(tree: Any) -> Any:
    """Return one `PartitionSpec` per leaf of a parameter-shaped tree of whole arrays, on the current mesh."""

    def spec(path, leaf):
        name = leaf_name(path)
        return layout_of(name, leaf.shape, leaf.shape[leaf.ndim - len(PARAMETERS[name].layout)])

    return jax.tree_util.tree_map_with_path(spec, tree)


def num_lead_dims(name: str, num_dims: int) -> int:
    """Return how many dims of a leaf of `num_dims` dims stand before its matrix: layers, or layers and experts."""
    return num_dims - PARAMETERS[name].matrix_dims


def matrix_shape(shape: Sequence[int], num_lead: int, row_dims: int) -> tuple[int, ...]:
    """Return [lead..., rows, columns] of a weight, or of a device's part of it."""
    split = num_lead + row_dims
    return (*shape[:num_lead], math.prod(shape[num_lead:split]), math.prod(shape[split:]))
