"""The bounds of a configuration's numbers and paths: beyond them no machine could do what it asks for.

Sizes and counts stay below 2**31, which is how XLA counts along an axis; numbers that a program computes with stay
within FP32. A number beyond is a typing error, and would end in an overflow deep inside, or in no end at all.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from deepseek_jax.inputs import local_path

if TYPE_CHECKING:
    from deepseek_jax.config import Config, Model

MOST = 2**31 - 1
MOST_TOKENS = 2.0**63
MOST_PARAMETERS = 1e13  # ten times the largest published models
LARGEST_FP32, SMALLEST_FP32 = 3.4028234e38, 1.1754944e-38  # the latter is the smallest normal number
LARGEST = {  # limit and reason; other whole numbers end at `MOST`
    "seed": (2**32 - 1, "JAX's keys take 32 bits, so larger seeds would repeat smaller ones"),
    "model.num_layers": (10_000, "the step is compiled for each stack of layers"),
    "model.num_mtp_layers": (100, "each is compiled by itself"),
    "model.num_experts": (2**20, "every device counts the tokens of each"),
    "data.prefetch": (64, "each window that is packed ahead takes about 100 MB"),
    "execution.scan_unroll": (10_000, "each unrolled layer is compiled by itself"),
}
KEYWORDS = {"stdlib", "bpe", "byte", ""}  # values of the paths below that are not paths


def expand_paths(config: "Config") -> "Config":
    """Return `config` with "~" expanded in its paths.

    Raises:
        ValueError: a path is an address, or malformed.
    """

    def expanded(text: str, key: str) -> str:
        if text in KEYWORDS:
            return text
        path = local_path(text, f"config.{key}")
        return str(path) if text.startswith("~") else text

    sources = tuple(
        dataclasses.replace(source, path=expanded(source.path, f"data.sources[{i}].path"))
        for i, source in enumerate(config.data.sources)
    )
    tokenizer = expanded(config.data.tokenizer, "data.tokenizer")
    weights = expanded(config.training.initial_weights, "training.initial_weights")
    return config.with_(data={"sources": sources, "tokenizer": tokenizer}, training={"initial_weights": weights})


def check_bounds(config: "Config", leaves: dict[str, Any]) -> None:
    """Refuse numbers that no machine could compute with.

    Args:
        config: converted, so its types are right; its numbers are finite, and positive or 0.
        leaves: its values by dotted key.

    Raises:
        ValueError: for the first number that is out of bounds; it names the bound.
    """
    for key, value in leaves.items():
        if isinstance(value, tuple) and key != "data.sources":
            for _, _, number in value:
                _check_fp32(f"config.{key}: value", number)
        if isinstance(value, bool) or not isinstance(value, int | float) or key == "training.num_tokens":
            continue
        if isinstance(value, int):
            most, reason = LARGEST.get(key, (MOST, "sizes and counts have 31 bits"))
            if value > most:
                raise ValueError(f"config.{key} = {_number(value)} must be at most {most}: {reason}; lower it")
        else:
            _check_fp32(f"config.{key}", value)
    for i, source in enumerate(config.data.sources):
        if not 0.0 < source.weight <= LARGEST_FP32:
            raise ValueError(
                f"config.data.sources[{i}].weight = {source.weight:g} of {source.path!r} must be positive and finite;"
                " raise it, or remove the source"
            )
    if not 1.0 <= config.training.num_tokens < MOST_TOKENS:
        raise ValueError(
            f"config.training.num_tokens = {config.training.num_tokens:g} must be at least 1 and below 2**63; change it"
        )
    _check_tokens(config)
    if (count := num_parameters(config.model)) > MOST_PARAMETERS:
        raise ValueError(
            f"config.model has {count:.1e} parameters, more than {MOST_PARAMETERS:.0e}, which no machine holds; lower"
            " its largest size, such as width, num_layers, num_experts or vocab_size"
        )


def _check_fp32(name: str, value: float) -> None:
    """Refuse a number that FP32 does not hold."""
    if abs(value) > LARGEST_FP32:
        raise ValueError(f"{name} = {value:g} is beyond {LARGEST_FP32:.1e}, the largest number of FP32; lower it")
    if 0.0 < abs(value) < SMALLEST_FP32:
        raise ValueError(f"{name} = {value:g} is below {SMALLEST_FP32:.1e}, the smallest number of FP32; raise it")


def _check_tokens(config: "Config") -> None:
    length = config.data.sequence_length
    for key, sequences in (
        ("micro_batch_size", config.training.micro_batch_size),
        *(("batch_size", value) for _, _, value in config.training.batch_size),
    ):
        if sequences * length > MOST:
            raise ValueError(
                f"config.training.{key} = {sequences:g} sequences of data.sequence_length = {length} are more than"
                f" {MOST} tokens; lower either"
            )


def num_parameters(model: "Model") -> float:
    """Return about how many numbers the matrices of `model` have."""
    width, attention = model.width, attention_weights(model)
    experts = (model.num_experts + model.num_shared_experts) * 3 * width * model.expert_hidden
    moe = attention + experts + width * model.num_experts
    dense = attention + 3 * width * model.dense_hidden
    layers = model.num_dense_layers * dense + model.num_moe_layers * moe
    return float(layers + model.num_mtp_layers * (moe + 2 * width**2) + 2 * model.vocab_size * width)


def attention_weights(model: "Model") -> int:
    """Return how many numbers the matrices of a layer's attention have."""
    query_width = model.num_heads * model.query_dim
    query = model.query_latent * (model.width + query_width) if model.query_latent else model.width * query_width
    compress = model.width * (model.kv_latent + model.rotary_dim)
    expand = model.kv_latent * model.num_heads * (model.content_dim + model.value_dim)
    return query + compress + expand + model.num_heads * model.value_dim * model.width


def _number(value: int) -> str:
    """Return a whole number that may have thousands of digits."""
    return str(value) if abs(value) < 10**30 else f"{str(value)[:10]}... ({value.bit_length()} bits)"
