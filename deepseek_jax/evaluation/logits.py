"""Logits, routes and gates of a checkpoint for given tokens, to compare with another implementation."""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, Execution, Model
from deepseek_jax.inputs import regular_file, shown
from deepseek_jax.model import transformer
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.model.router import weigh
from deepseek_jax.model.transformer import Inputs, shifted
from deepseek_jax.parallel.context import refuse_context
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parallel.program import jit_on, resolve_for
from deepseek_jax.parallel.stages import refuse_pipeline
from deepseek_jax.parallel.weights import gather, with_fp8
from deepseek_jax.parameters import ROWS, TOKENS, Fp8Weight, P, Weights
from deepseek_jax.training.evaluation import place_batch

PER_LAYER = ("experts", "expert_weights")


def logits(config: Config, weights: Weights, tokens_BS: np.ndarray, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """Run the model over whole rows, one document each.

    Args:
        config: `execution.precision` is that of the arithmetic. For "fp8", FP32 weights are quantised, and FP8 weights
            are used as they are.
        weights: as `huggingface.load.load` returns them on `mesh`.
        tokens_BS: int32; all rows run at once, split over the devices.
        mesh: the mesh of the weights.

    Returns:
        `logits` [B, S, V] FP32; `experts` [moe layers, B, S, K] int32, the largest gate first, with their gates
        `expert_weights` in FP32; where the model has an MTP layer, `mtp_logits` [B, S - 1, V] FP32 of its first.

    Raises:
        ValueError: tokens of another shape or dtype, or beyond the vocabulary; or a logit is not a number.
    """
    check_tokens(tokens_BS, config.model.vocab_size, "tokens_BS")
    refuse_context(mesh, "a pass that returns logits")
    refuse_pipeline(dict(mesh.shape), "a pass that returns logits")
    num_rows = len(tokens_BS)
    tokens_BS = np.pad(tokens_BS, ((0, -num_rows % axis_size(mesh, ROWS)), (0, 0)), mode="edge").astype(np.int32)
    with jax.set_mesh(mesh):
        execution = resolve_for(config, mesh).execution
        run = jit_on(_forward, execution, mesh, config.model, execution)
        results = run(weights, place_batch({"tokens_BS": tokens_BS}, mesh)["tokens_BS"])
    found = {
        name: np.asarray(array)[:, :num_rows] if name in PER_LAYER else np.asarray(array)[:num_rows]
        for name, array in results.items()
    }
    for name in found.keys() - set(PER_LAYER):
        if wrong := np.argwhere(~np.isfinite(found[name]).all(axis=-1)).tolist():
            raise ValueError(
                f"{name} are not finite numbers at {len(wrong)} places, row and position {wrong[0]} the first: the"
                " weights are damaged, or --precision overflows; try another precision or checkpoint"
            )
    return found


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Return the tokens [B, S] of a file.

    Raises:
        ValueError: it is no regular file that `np.save` made of int32 [B, S] within the vocabulary.
    """
    where = shown(str(path))
    if not os.path.lexists(path):
        raise ValueError(f"{where} is missing; --tokens is a file that np.save made of int32 [B, S]")
    with regular_file(path) as file:  # a FIFO would wait for ever
        magic = file.read(len(np.lib.format.MAGIC_PREFIX))
    if magic.startswith(b"PK"):
        raise ValueError(f"{where} is a zip, as np.savez makes it of several arrays; give int32 [B, S] of np.save")
    try:
        tokens_BS = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may promise more than the file holds
    except (EOFError, OSError, OverflowError, TypeError, ValueError, SyntaxError) as error:
        reason = shown(str(error).partition("\n")[0])
        raise ValueError(f"{where} is not an .npy file ({reason}); make it with np.save of int32 [B, S]") from error
    check_tokens(tokens_BS, vocab_size, where)
    return np.array(tokens_BS)


def check_tokens(tokens_BS: np.ndarray, vocab_size: int, origin: str) -> None:
    """Refuse tokens of another shape or dtype, or beyond the vocabulary; `origin` says where they come from."""
    if not np.issubdtype(tokens_BS.dtype, np.integer) or tokens_BS.ndim != 2 or not tokens_BS.size:
        raise ValueError(f"{origin} has {tokens_BS.dtype} {list(tokens_BS.shape)}; give int32 [B, S]")
    low, high = tokens_BS.min(), tokens_BS.max()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{origin} has tokens from {low} to {high}, the vocabulary is 0 to {vocab_size - 1}; use the checkpoint's"
            " tokenizer"
        )


def _forward(model: Model, execution: Execution, weights: Weights, tokens_BS: jax.Array) -> dict[str, jax.Array]:
    def local(weights, tokens_BS):
        load = functools.partial(gather, dtype=compute_dtype(execution), num_experts=model.num_experts)
        if not any(isinstance(w, Fp8Weight) for w in jax.tree.leaves(weights.params, is_leaf=_is_fp8)):
            weights = weights._replace(params=with_fp8(model, execution, weights.params))
        output = transformer.apply(
            model, execution, weights, _whole_rows(tokens_BS, model.num_mtp_layers), load, _chosen
        )
        head_DV = load({"head_DV": weights.params["head_DV"]})["head_DV"]

        def head(hidden_BSD):
            return jnp.matmul(hidden_BSD, head_DV, preferred_element_type=jnp.float32)

        results = {"logits": head(output.hidden_BSD)}
        if output.observed is not None:
            experts, gates = (array[: model.num_moe_layers] for array in output.observed)
            results |= {"experts": experts, "expert_weights": gates}
        if output.mtp_hidden:
            results["mtp_logits"] = head(output.mtp_hidden[0][:, :-1])
        return results

    names = ["logits"]
    if model.num_moe_layers or model.num_mtp_layers:
        names += PER_LAYER
    if model.num_mtp_layers:
        names.append("mtp_logits")
    laid_out = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, (weights, tokens_BS))
    out_specs = {name: P(None, TOKENS) if name in PER_LAYER else P(TOKENS) for name in names}
    return jax.shard_map(local, in_specs=laid_out, out_specs=out_specs)(weights, tokens_BS)


def _is_fp8(leaf: Any) -> bool:
    return isinstance(leaf, Fp8Weight)


def _whole_rows(tokens_BS: jax.Array, num_mtp_layers: int) -> Inputs:
    """Return rows that are one document each, without padding."""
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
    # The token after the last one is unknown; no logits are made from it. One MTP depth has logits.
    following = tuple(shifted(tokens_BS, 1 + depth) for depth in range(num_mtp_layers))
    return Inputs(tokens_BS, positions_BS, jnp.ones_like(tokens_BS, dtype=bool), None, following)


def _chosen(model: Model, scores_BSE: jax.Array, experts_BSK: jax.Array, valid_BS: jax.Array) -> tuple[Any, ...]:
    """Return experts and gates, the largest gate first; the router selects in the order of the biased scores."""
    gates_BSK = weigh(model, scores_BSE, experts_BSK)
    order = jnp.argsort(-gates_BSK, axis=-1, stable=True)
    return jnp.take_along_axis(experts_BSK, order, axis=-1), jnp.take_along_axis(gates_BSK, order, axis=-1)
