"""What a checkpoint of a model holds, and whether a folder holds it."""

import math
import re
from collections.abc import Collection

from deepseek_jax.config import Model
from deepseek_jax.huggingface.names import tensors
from deepseek_jax.inputs import shown
from deepseek_jax.safetensors.folder import Shards, compare
from deepseek_jax.safetensors.header import DTYPES

UNQUANTIZED = ("BF16", "F16", "F32")  # dtypes that other programs store where ours stores BF16
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
# Frequencies of the rotary part, constants that the config gives: Moonlight and Kimi-K2 store them in every layer.
ROTARY_CONSTANTS = re.compile(r"model\.layers\.\d{1,9}\.self_attn\.rotary_emb\.inv_freq")


def expected(model: Model, fp8: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor that a checkpoint of `model` has, by name."""
    contents = {}
    for tensor in tensors(model):
        quantized = fp8 and tensor.quantized
        contents[tensor.name] = (tensor.dtype if quantized or not tensor.quantized else "BF16", tensor.shape)
        if quantized:
            contents[tensor.scale_name] = ("F32", tensor.scale_shape)
    return contents


def num_bytes(model: Model, fp8: bool) -> int:
    """Return the bytes of all tensors of a checkpoint of `model`."""
    return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in expected(model, fp8).values())


def check(shards: Shards, model: Model, fp8: bool) -> None:
    """Refuse a folder that is not a checkpoint of `model`.

    An MTP layer may lack its copies of the embedding and the head. Constants of the rotary part may be there; they are
    not read. What is in BF16 when released may be in FP16 or FP32, and a selection bias in BF16 or FP16, whose numbers
    FP32 has, too.

    Raises:
        ValueError: tensors are missing or unknown, or of the wrong shape or dtype; each is named with its file.
    """
    contents = expected(model, fp8)
    _refuse_unannounced_mtp(shards, model, contents.keys())
    for name, (dtype, shape) in contents.items():
        stored = shards.entries[name].dtype if name in shards.entries else dtype
        widened = dtype == "BF16" or (dtype == "F32" and not name.endswith("_scale_inv"))
        contents[name] = (stored if widened and stored in UNQUANTIZED else dtype, shape)
    optional = {tensor.name for tensor in tensors(model) if tensor.copied}
    optional |= {name for name in shards.entries if ROTARY_CONSTANTS.fullmatch(name)}
    compare(shards, contents, frozenset(optional))


def lacks_mtp(shards: Shards, model: Model) -> bool:
    """Return whether `model` has MTP layers, and a folder has no tensor of any layer behind the last main one."""
    behind = (_layer(name) >= model.num_layers for name in shards.entries if not ROTARY_CONSTANTS.fullmatch(name))
    return model.num_mtp_layers > 0 and not any(behind)


def _refuse_unannounced_mtp(shards: Shards, model: Model, known: Collection[str]) -> None:
    """Name the key of config.json that is missing or too small, if MTP layers are all that a folder has in excess."""
    extra = {_layer(name) for name in shards.entries if name not in known and not ROTARY_CONSTANTS.fullmatch(name)}
    first = model.num_layers + model.num_mtp_layers
    mtp = {_layer(name) for name in shards.entries if name.endswith(".eh_proj.weight")}
    if (
        extra
        and extra == set(range(first, first + len(extra)))
        and mtp == set(range(model.num_layers, first + len(extra)))
    ):
        raise ValueError(
            f"{shown(str(shards.folder))} has tensors of an MTP layer, model.layers.{first}, that its config.json does"
            f' not announce; set "num_nextn_predict_layers": {model.num_mtp_layers + len(extra)} there, or remove them'
        )


def _layer(name: str) -> int:
    match = LAYER.match(name)
    return int(match[1]) if match else -1
