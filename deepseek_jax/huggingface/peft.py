"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors, in FP32.

    ours                                stored, under base_model.model.<module of the model>
    lora_a_IU [in, U]                   lora_A.weight [U, in]
    lora_b_UO [U, out]                  lora_B.weight [out, U]; of gate and up each its half, with the same A

`target_modules` are the last two parts of a module's name (`self_attn.q_a_proj`, `mlp.gate_proj`): PEFT takes every
module whose name ends so, and no shared or routed expert's does where a dense layer is meant.

Source: "PEFT checkpoint format", huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.adapters import Lora
from deepseek_jax.config import Model
from deepseek_jax.files import replacing, write_all, write_atomically
from deepseek_jax.huggingface.names import Tensor, tensors
from deepseek_jax.inputs import shown
from deepseek_jax.safetensors.writer import Planned, bytes_of, header_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_tensors(adapters: Any, model: Model) -> dict[str, np.ndarray]:
    """Return A and B of every matrix of the checkpoint that has them, by PEFT's names."""
    found = {}
    for tensor in tensors(model):
        pair = None if tensor.copied else _pair(adapters, tensor)
        if pair is None:
            continue
        a, b = (np.asarray(pair[name])[tensor.index] for name in sorted(pair))
        if tensor.half is not None:
            b = np.split(b, 2, axis=1)[tensor.half]
        module = PREFIX + tensor.name.removesuffix(".weight")
        found[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
        found[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    return found


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but adapters in PEFT's format."""
    if folder.is_dir() and (others := sorted({file.name for file in folder.iterdir()} - {CONFIG, WEIGHTS})):
        files = ", ".join(map(shown, others[:5]))
        raise ValueError(f"{shown(str(folder))} holds {files} and is no folder of adapters; choose another --hf")


def save_adapters(adapters: Any, lora: Lora, model: Model, folder: Path, base: str) -> int:
    """Write a folder that PEFT loads onto the base model; return the number of bytes of its tensors.

    Args:
        adapters: the tree of pairs; whole on this process.
        lora: their rank and scale.
        model: that they are of.
        folder: new, or one that is replaced.
        base: name or folder of the base model, for PEFT.
    """
    found = adapter_tensors(adapters, model)
    modules = {".".join(name.split(".lora_")[0].split(".")[-2:]) for name in found}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    planned = [Planned(name, "F32", array.shape) for name, array in found.items()]
    with replacing(folder / WEIGHTS) as descriptor:
        write_all(descriptor, memoryview(header_bytes(planned)))
        for plan in planned:
            write_all(descriptor, bytes_of(found[plan.name], plan))
        os.fsync(descriptor)
    write_atomically(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
    return sum(array.nbytes for array in found.values())


def _pair(adapters: Any, tensor: Tensor) -> dict[str, Any] | None:
    """Return the pair of the leaf that a tensor fills, if it has one."""
    if tensor.leaf[0] != "params":
        return None
    return functools.reduce(lambda node, key: node.get(key) if node else None, tensor.leaf[1:], adapters)
