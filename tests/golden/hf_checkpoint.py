"""Read a small Hugging Face checkpoint and its goldens into our config and parameter tree.

It serves tests: whole files, numpy, float32.

A checkpoint stores a linear weight as [out, in]; ours is [in, out], with the heads, the two halves of a gated FFN, the
layers and the experts as dims of their own:

    q_b_proj [(N Q), A] -> [A, N, Q]            kv_a_proj_with_mqa [C + R, D] -> [D, C + R]
    kv_b_proj [(N X), C] -> [C, N, X]           a head's X rows are its P content rows, then its H value rows
    o_proj [D, (N H)] -> [N, H, D]              gate_proj, up_proj [F, D] each -> [D, 2, F]
    eh_proj [D, 2D] -> [2, D, D]                columns: embedding first, hidden state second

Rotary rows keep the checkpoint's order, interleaved pairs. Layers `num_hidden_layers` and beyond are MTP layers; their
copies of the embedding and the head must equal the shared ones and are dropped.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from configs import deepseek_v3
from deepseek_jax import config as config_lib
from deepseek_jax.huggingface.config import read_model
from deepseek_jax.parallel.program import resolve
from tests.golden import cases

FOLDER = pathlib.Path(__file__).parent
CASES = tuple(case.name for case in cases.CASES)
FP8 = cases.FP8.name  # its weights are E4M3 and BF16: `read_expected` only


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case: our config, the checkpoint's weights as our trees, and the oracle's arrays (keys: `make_goldens`)."""

    config: config_lib.Config
    params: dict[str, Any]
    router_bias: dict[str, Any]
    expected: dict[str, np.ndarray]


def read(case: str) -> Golden:
    """Read a case of this folder."""
    config, expected = read_expected(case)
    params, router_bias = read_trees(load_file(FOLDER / case / "model.safetensors"), config.model)
    return Golden(config, params, router_bias, expected)


def read_expected(case: str) -> tuple[config_lib.Config, dict[str, np.ndarray]]:
    """Read our config and the oracle's arrays of a case, not its weights."""
    folder = FOLDER / case
    model = read_model(json.loads((folder / "config.json").read_text()))
    with np.load(folder / "golden.npz") as arrays:
        expected = dict(arrays)
    return run_config(case, model, expected["tokens_BS"].shape), expected


def batch(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case's tokens as a batch of unpadded rows, one document each."""
    tokens_BS = expected["tokens_BS"]
    return {
        "tokens_BS": tokens_BS,
        "targets_BS": expected["targets_BS"],
        "positions_BS": np.broadcast_to(np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape),
        "segment_ids_BS": np.ones_like(tokens_BS),
        "loss_weights_BS": np.ones(tokens_BS.shape, np.float32),
    }


def read_gradients(case: str, model: config_lib.Model) -> dict[str, Any]:
    """Read the oracle's gradients as a tree like the parameters."""
    return read_trees(load_file(FOLDER / case / "gradients.safetensors"), model)[0]


def run_config(name: str, model: config_lib.Model, shape_BS: tuple[int, int]) -> config_lib.Config:
    """Wrap `model` into a whole FP32 config for one CPU device and batches of `shape_BS`, without balance losses."""
    batch, length = shape_BS
    tree = deepseek_v3.get_config().to_dict()
    tree |= {"name": name, "model": dataclasses.asdict(model)}
    tree["loss"] |= {"sequence_balance_weight": 0.0, "batch_balance_weight": 0.0}
    tree["data"] |= {"sequence_length": length}
    tree["training"] |= {"batch_size": (("constant", 1.0, batch),), "micro_batch_size": batch}
    tree["mesh"] |= {"data": 1, "node": 1, "expert": 1}
    # Blocks smaller than the arrays, so that chunked paths run with more than one chunk, the last one partly filled.
    tree["execution"] |= {
        "precision": "fp32",
        "attention_chunk": 24,
        "expert_block": 8,
        "expert_wave": 4,
        "loss_chunk": 40,
    }
    return resolve(config_lib.from_config_dict(tree), "cpu", 1)


def read_trees(tensors: dict[str, np.ndarray], model: config_lib.Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert tensors under the released names to (params, router_bias); also for tensors that are weights' gradients.

    Raises:
        ValueError: a tensor is missing, unknown, or an MTP copy of the embedding or head differs from the shared one.
    """
    left = dict(tensors)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(
                f"the checkpoint has no tensor {name!r}; it holds {sorted(tensors)[:4]}...; check its config.json"
            )
        return left.pop(name)

    def stacked(read_layer: Callable, indices: range) -> dict[str, Any]:
        layers = [read_layer(take, f"model.layers.{index}", model) for index in indices]
        return {} if not layers else _stack(layers)

    depth = model.num_layers
    params = {
        "embed_VD": take("model.embed_tokens.weight"),
        "head_DV": take("lm_head.weight").T,
        "final_norm_D": take("model.norm.weight"),
        "dense_layers": stacked(_dense_layer, range(model.num_dense_layers)),
        "moe_layers": stacked(_moe_layer, range(model.num_dense_layers, depth)),
        "mtp_layers": stacked(_mtp_layer, range(depth, depth + model.num_mtp_layers)),
    }
    router_bias = {
        "moe_layers": _take_biases(left, range(model.num_dense_layers, depth), model),
        "mtp_layers": {"block": _take_biases(left, range(depth, depth + model.num_mtp_layers), model)},
    }
    if not model.num_mtp_layers:
        del params["mtp_layers"], router_bias["mtp_layers"]
    _drop_copies(left, params, range(depth, depth + model.num_mtp_layers))
    if left:
        raise ValueError(
            f"unknown tensors {sorted(left)[:4]}...: config.json and the checkpoint do not belong together"
        )
    return params, router_bias


def _attention(take: Callable, name: str, model: config_lib.Model) -> dict[str, np.ndarray]:
    def heads(tensor: str) -> np.ndarray:  # [(N X), in] -> [in, N, X]
        rows = take(f"{name}.self_attn.{tensor}.weight")
        return rows.T.reshape(rows.shape[1], model.num_heads, -1)

    tree = {"norm_D": take(f"{name}.input_layernorm.weight")}
    if model.query_latent:
        tree["q_a_DA"] = take(f"{name}.self_attn.q_a_proj.weight").T
        tree["q_norm_A"] = take(f"{name}.self_attn.q_a_layernorm.weight")
        tree["q_b_ANQ"] = heads("q_b_proj")
    else:
        tree["q_DNQ"] = heads("q_proj")
    tree["kv_a_DC"] = take(f"{name}.self_attn.kv_a_proj_with_mqa.weight").T
    tree["kv_norm_C"] = take(f"{name}.self_attn.kv_a_layernorm.weight")
    tree["kv_b_CNX"] = heads("kv_b_proj")
    tree["o_NHD"] = take(f"{name}.self_attn.o_proj.weight").T.reshape(model.num_heads, model.value_dim, model.width)
    return tree


def _ffn(take: Callable, name: str) -> dict[str, np.ndarray]:
    gate_up = [take(f"{name}.{half}_proj.weight").T for half in ("gate", "up")]
    return {"gate_up_D2F": np.stack(gate_up, axis=1), "down_FD": take(f"{name}.down_proj.weight").T}


def _dense_layer(take: Callable, name: str, model: config_lib.Model) -> dict[str, Any]:
    norm = {"norm_D": take(f"{name}.post_attention_layernorm.weight")}
    return {"attention": _attention(take, name, model), "ffn": norm | _ffn(take, f"{name}.mlp")}


def _moe_layer(take: Callable, name: str, model: config_lib.Model) -> dict[str, Any]:
    experts = [_ffn(take, f"{name}.mlp.experts.{expert}") for expert in range(model.num_experts)]
    moe = {
        "norm_D": take(f"{name}.post_attention_layernorm.weight"),
        "router_DE": take(f"{name}.mlp.gate.weight").T,
        "gate_up_ED2F": np.stack([expert["gate_up_D2F"] for expert in experts]),
        "down_EFD": np.stack([expert["down_FD"] for expert in experts]),
    }
    if model.num_shared_experts:
        moe["shared"] = _ffn(take, f"{name}.mlp.shared_experts")
    return {"attention": _attention(take, name, model), "moe": moe}


def _mtp_layer(take: Callable, name: str, model: config_lib.Model) -> dict[str, Any]:
    return {
        "embed_norm_D": take(f"{name}.enorm.weight"),
        "hidden_norm_D": take(f"{name}.hnorm.weight"),
        "merge_2DD": take(f"{name}.eh_proj.weight").T.reshape(2, model.width, model.width),
        "block": _moe_layer(take, name, model),
        "final_norm_D": take(f"{name}.shared_head.norm.weight"),
    }


def _take_biases(left: dict[str, np.ndarray], layers: range, model: config_lib.Model) -> dict[str, Any]:
    """Selection biases [L, E]; zeros where the checkpoint has none (V2, and gradients)."""
    zeros = np.zeros(model.num_experts, np.float32)
    names = [f"model.layers.{index}.mlp.gate.e_score_correction_bias" for index in layers]
    return {"moe": {"bias_E": np.stack([left.pop(name, zeros) for name in names])}} if names else {}


def _drop_copies(left: dict[str, np.ndarray], params: dict[str, Any], layers: range) -> None:
    for index in layers:
        for tensor, shared in (("embed_tokens", params["embed_VD"]), ("shared_head.head", params["head_DV"].T)):
            name = f"model.layers.{index}.{tensor}.weight"
            if name in left and not np.array_equal(left.pop(name), shared):
                raise ValueError(
                    f"{name} differs from the shared tensor; MTP layers here share the main model's embedding and head"
                )


def _stack(layers: list[Any]) -> Any:
    """Stack equal trees leaf by leaf, layers first; every leaf becomes contiguous."""
    if isinstance(layers[0], dict):
        return {key: _stack([layer[key] for layer in layers]) for key in layers[0]}
    return np.stack(layers)
