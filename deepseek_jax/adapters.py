"""Adapters of low rank (LoRA, arXiv 2106.09685) beside weights that stay as they are.

    y = x W + (alpha / rank) (x A) B         A [in, rank], B [rank, out]; B begins with zeros

W is frozen: in E4M3 as a checkpoint stores it, in BF16 or in FP32. It is an argument of the step and no part of the
training state, so gradients, moments and checkpoints are of A and B alone, in FP32. A layer finds an `Adapted` in place
of its weight, and the products know what to do (`model.linear`).

A weight has one pair, stacked over layers as the weight is. Gate and up lie in one weight and share an A.

The pair is of the flat matrix [in, out], whatever dims the weight has. In a tree of adapters it stands where the weight
stands in the tree of parameters, and has rows of `PARAMETERS` of its own:

    params      dense_layers attention q_b_ANQ   [L, A, N, Q]
    adapters    dense_layers attention q_b_ANQ   {lora_a_IU [L, A, U], lora_b_UO [L, U, N Q]}

Adapters of dense weights lie on every device; those of experts lie where the experts are.

The alternative that lost: to multiply with W + A B, made anew at each use. For W in FP8 it would be quantised once
more, which loses updates smaller than half a step of E4M3, and the gradient of a whole W would be made to get that of a
pair.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parameters import (
    PARAMETERS,
    CastWeight,
    Fp8Weight,
    Weights,
    leaf_name,
    matrix_shape,
    num_lead_dims,
    partition_specs,
)

STACKS = ("dense_layers", "moe_layers")  # MTP layers stay as they are: no format of adapters has names for theirs
EXPERTS = "experts"  # the target that stands for the routed experts, which have no part of a model to themselves

Pair = dict[str, jax.Array]
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which weights have adapters, and of which size.

    Attributes:
        rank: of A B.
        alpha: A B is multiplied by alpha / rank.
        targets: parts of a layer ("attention", "ffn", "shared", "experts") or names of weights ("q_b_ANQ", "down_FD").
        initial: the adapters to begin with, "workdir@step" of a run of adapters of the same base; "": B is zero.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    initial: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight with an adapter; a layer finds it in place of the weight.

    Attributes:
        base: the weight, an array, `CastWeight` or `Fp8Weight`; its gradient is not asked for.
        pair: A and B under their names in `PARAMETERS`; None: not there yet.
        scale: alpha / rank.
    """

    base: Any
    pair: Pair | None
    scale: float = dataclasses.field(metadata={"static": True})


def is_weight(leaf: Any) -> bool:
    """Return whether a node of a tree of parameters is one weight."""
    return isinstance(leaf, Adapted | Fp8Weight | CastWeight | jax.Array | jax.ShapeDtypeStruct)


def base_of(weight: Any) -> Any:
    """Return a weight without its adapter."""
    return weight.base if isinstance(weight, Adapted) else weight


def shape_of(weight: Any) -> tuple[int, ...]:
    """Return the shape of a weight in any form."""
    weight = base_of(weight)
    return (weight.values if isinstance(weight, Fp8Weight | CastWeight) else weight).shape


def has_adapters(tree: Any) -> bool:
    """Return whether any weight of a tree has an adapter."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    return any(isinstance(leaf, Adapted) for leaf in leaves)


def halves(weight: Adapted) -> tuple[jax.Array, jax.Array]:
    """Return A and B."""
    assert weight.pair is not None
    a, b = (weight.pair[name] for name in sorted(weight.pair))
    return a, b


def mark(lora: Lora, params: Tree) -> Tree:
    """Return parameters with an `Adapted` around each target, without its pair.

    Raises:
        ValueError: a target is no part of the model, or the rank is more than a matrix of it can have.
    """
    if missing := sorted(set(lora.targets) - set(targets_of(params))):
        raise ValueError(f"adapters: the model has no target {missing[0]!r}; choose of {targets_of(params)}")

    def mark_leaf(path, weight):
        if not _names(path) & set(lora.targets):
            return weight
        rows, columns = _matrix(path, weight)[-2:]
        if lora.rank > min(rows, columns):
            raise ValueError(
                f"adapters: rank = {lora.rank}, and {leaf_name(path)} is {rows} x {columns}, whose rank is at"
                f" most {min(rows, columns)}; give no more than that"
            )
        return Adapted(weight, None, lora.alpha / lora.rank)

    return jax.tree_util.tree_map_with_path(mark_leaf, params, is_leaf=is_weight)


def _matrix(path: Any, weight: Any) -> tuple[int, ...]:
    """Return [lead..., in, out] of a weight, which x is multiplied with as a matrix."""
    name, shape = leaf_name(path), shape_of(weight)
    return matrix_shape(shape, num_lead_dims(name, len(shape)), PARAMETERS[name].input_dims)


def targets_of(params: Tree) -> list[str]:
    """Return what `Lora.targets` may name."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return sorted(set().union(*(_names(path) for path, _ in leaves)))


def _names(path: Any) -> set[str]:
    """Return the names by which a target means the weight at a path; none of one that takes no adapter."""
    row = PARAMETERS[leaf_name(path)]
    if path[0].key not in STACKS or row.precision != "fp8":
        return set()
    return {str(entry.key) for entry in path[1:]} - {"moe"} | ({EXPERTS} if row.per_expert else set())


def adapt(marked: Any, adapters: Any) -> Any:
    """Return marked parameters with these pairs."""
    if isinstance(marked, Adapted):
        return dataclasses.replace(marked, pair=adapters)
    return {name: adapt(part, adapters[name]) if name in adapters else part for name, part in marked.items()}


def adapters_of(tree: Any) -> Tree:
    """Return the tree of the pairs; `adapt(tree, adapters_of(tree))` is `tree`."""
    parts = {}
    for name, part in tree.items():
        if isinstance(part, Adapted):
            parts[name] = part.pair
        elif isinstance(part, dict) and (inner := adapters_of(part)):
            parts[name] = inner
    return parts


def unadapted(weights: Weights) -> Weights:
    """Return weights without their adapters."""
    params = jax.tree.map(base_of, weights.params, is_leaf=lambda leaf: isinstance(leaf, Adapted | Fp8Weight))
    return weights._replace(params=params)


def init(rank: int, marked: Any, key: jax.Array) -> Tree:
    """Make the pairs of marked parameters: A uniform within 1 / sqrt(in), as PEFT has it, and B zero.

    Call it under `jax.set_mesh`.
    """

    def pair(path, weight):
        if not isinstance(weight, Adapted):
            return weight
        *lead, rows, columns = _matrix(path, weight)
        is_expert = PARAMETERS[leaf_name(path)].per_expert
        names = ("lora_a_EIU", "lora_b_EUO") if is_expert else ("lora_a_IU", "lora_b_UO")
        # by the path, so that an adapter begins with the same numbers whatever the other targets are
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        bound = 1.0 / math.sqrt(rows)
        a = jax.random.uniform(own, (*lead, rows, rank), jnp.float32, -bound, bound)
        return dataclasses.replace(weight, pair=dict(zip(names, (a, jnp.zeros((*lead, rank, columns))), strict=True)))

    adapters = adapters_of(jax.tree_util.tree_map_with_path(pair, marked, is_leaf=is_weight))
    return jax.tree.map(jax.sharding.reshard, adapters, partition_specs(adapters))
