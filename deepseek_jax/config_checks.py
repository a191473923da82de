"""The checks of a configuration. Every refusal is a ValueError that names the value and the remedy."""

import difflib
import functools
import logging
import math
import types
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from deepseek_jax.config_bounds import check_bounds
from deepseek_jax.inputs import shown
from deepseek_jax.pipeline.schedules import SCHEDULES
from pallas_kernels import GROUP

if TYPE_CHECKING:
    from deepseek_jax.config import Config, Model

# Half a unit in the last place of BF16 is 0.2 to 0.4% of a value. One step lowers the second moment by at most 1 - b2
# of its value: at b2 = 0.999 by 0.1%, which rounds away, so a moment that has risen never falls. At 0.99 it can fall.
LARGEST_B2 = 0.99
CHOICES = {
    "model.gate": ("sigmoid", "softmax"),
    "model.group_score": ("top2", "max"),
    "loss.balance_frequency": ("unbiased", "selected"),
    "optimizer.ema_memory": ("device", "host"),
    "data.on_error": ("refuse", "skip"),
    "execution.precision": ("fp32", "bf16", "fp8"),
    "execution.remat": ("none", "selective", "full", "offload"),
    "execution.gather": ("layer", "kept", "step"),
    "execution.attention": ("auto", "xla", "cudnn", "splash"),
    "execution.exchange": ("auto", "local", "dense", "two_hop"),
    "execution.experts": ("auto", "blocks", "grouped"),
    "execution.schedule": tuple(SCHEDULES),
}
MAY_BE_ZERO = {  # every other number is positive
    "seed",
    "model.num_dense_layers",
    "model.query_latent",
    "model.num_shared_experts",
    "model.num_mtp_layers",
    "model.yarn.mscale",
    "model.yarn.mscale_all_dim",
    "loss.sequence_balance_weight",
    "loss.batch_balance_weight",
    "loss.z_loss_weight",
    "optimizer.warmup_steps",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.weight_decay",
    "optimizer.ema_decay",
    "data.heldout_fraction",
    "data.fim_rate",
    "data.split_rate",
    "data.prefetch",
    "training.eval_every",
}


def present(kind: Any) -> Any:
    """Return X of an annotation `X | None`: the type of a section that may be left out."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def unknown_key(path: str, key: str, fields: Iterable[str]) -> str:
    """Return what to say of a key that the section at `path` does not have."""
    if (path, key) == ("config", "posttraining"):
        return "config.posttraining: this configuration is for experiments.posttrain; use that command"
    close = difflib.get_close_matches(key, fields, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {sorted(fields)}"
    return f"{path}.{shown(key)} is unknown; {remedy}"


def check(config: "Config", leaves: dict[str, Any]) -> None:
    """Refuse values out of range, impossible shapes, and settings that would not do what they say.

    Args:
        config: converted, so its types are right.
        leaves: its values by dotted key (`config.flatten`).

    Raises:
        ValueError: for the first fault that is found.
    """
    _check_ranges(config, leaves)
    check_bounds(config, leaves)
    _check_model(config.model)
    _check_training(config)
    if config.execution.precision == "fp8":
        _check_fp8(config)
    if (config.execution.gather, config.execution.remat) == ("kept", "none"):
        raise ValueError(
            "config.execution.gather = 'kept' says nothing with execution.remat = 'none', which keeps all that a layer"
            " gathers: use gather = 'layer', or remat = 'selective'"
        )
    if (config.optimizer.ema_memory, config.optimizer.ema_decay) == ("host", 0.0):
        raise ValueError(
            "config.optimizer.ema_memory = 'host' says nothing with optimizer.ema_decay = 0, which keeps no average:"
            " set ema_decay, or use ema_memory = 'device'"
        )
    if (config.execution.precision, config.execution.experts) in {("fp8", "blocks"), ("fp32", "grouped")}:
        raise ValueError(
            f"config.execution.experts = {config.execution.experts!r} does not exist for execution.precision ="
            f" {config.execution.precision!r}: 'grouped' is BF16 or FP8, 'blocks' BF16 or FP32; use 'auto'"
        )


def _check_ranges(config: "Config", leaves: dict[str, Any]) -> None:
    for path, value in leaves.items():
        if path in CHOICES and value not in CHOICES[path]:
            raise ValueError(f"config.{path} = {value!r} is unknown; choose one of {CHOICES[path]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config.{path} = {value} must be finite")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not path.startswith("mesh.")
        if is_number and (value < 0 or (value == 0 and path not in MAY_BE_ZERO)):
            raise ValueError(f"config.{path} = {value} must be {'at least 0' if path in MAY_BE_ZERO else 'positive'}")
    data, optimizer = config.data, config.optimizer
    for name in ("heldout_fraction", "fim_rate", "split_rate"):
        if getattr(data, name) > 1.0:
            raise ValueError(f"config.data.{name} = {getattr(data, name)} is a fraction; it must lie in [0, 1]")
    for name in ("b1", "b2", "ema_decay"):
        if getattr(optimizer, name) >= 1.0:
            raise ValueError(
                f"config.optimizer.{name} = {getattr(optimizer, name)} must be below 1: such an average never moves"
            )


def _check_model(model: "Model") -> None:
    def refuse(text: str) -> NoReturn:
        raise ValueError(f"config.model: {text}")

    if model.num_dense_layers > model.num_layers:
        refuse(f"num_dense_layers = {model.num_dense_layers} exceeds num_layers = {model.num_layers}; lower it")
    if model.rotary_dim % 2:
        refuse(f"rotary_dim = {model.rotary_dim} must be even: channels are rotated in pairs")
    if model.num_experts % model.num_groups:
        refuse(f"num_experts = {model.num_experts} is not divisible by num_groups = {model.num_groups}; change either")
    if model.num_kept_groups > model.num_groups:
        refuse(f"num_kept_groups = {model.num_kept_groups} exceeds num_groups = {model.num_groups}; lower it")
    group_size = model.num_experts // model.num_groups
    kept = model.num_kept_groups * group_size
    if model.experts_per_token > kept:
        refuse(
            f"experts_per_token = {model.experts_per_token} exceeds the {kept} experts of {model.num_kept_groups} kept"
            f" groups of {group_size}; lower it or keep more groups"
        )
    if model.group_score == "top2" and group_size < 2:
        refuse(f"group_score 'top2' needs groups of 2 experts or more, got {group_size}; use 'max' or fewer groups")
    if model.num_mtp_layers and not model.num_moe_layers:
        refuse("MTP layers are MoE layers; set num_mtp_layers = 0 or num_dense_layers < num_layers")
    if model.num_moe_layers and model.experts_per_token == kept:
        _warn_once(
            f"config.model: experts_per_token = {model.experts_per_token} takes all experts of the"
            f" {model.num_kept_groups} kept groups of {group_size}, so "
            + (
                "the router chooses groups and no experts within them"
                if model.num_kept_groups < model.num_groups
                else "every token goes to every expert and the router has no choice"
            )
            + "; lower experts_per_token, or keep more groups or experts"
        )
    if model.rope_base <= 1.0:
        refuse(f"rope_base = {model.rope_base} must be above 1: it sets how fast frequencies fall; 10000 is usual")
    if model.yarn.factor < 1.0:
        refuse(f"yarn.factor = {model.yarn.factor} must be at least 1")


@functools.cache
def _warn_once(text: str) -> None:
    """A run converts its configuration several times."""
    logging.getLogger(__name__).warning(text)


def _check_fp8(config: "Config") -> None:
    """Refuse dims that are not multiples of 128: every product in FP8 sums over groups of 128."""
    model = config.model
    sums = {
        "width": model.width,
        "query_latent": model.query_latent,
        "kv_latent": model.kv_latent,
        "num_heads * value_dim": model.num_heads * model.value_dim,
        "dense_hidden": model.dense_hidden if model.num_dense_layers else 0,
        "expert_hidden": model.expert_hidden if model.num_moe_layers else 0,
    }
    for name, size in sums.items():
        if size % GROUP:
            raise ValueError(
                f"config.model: {name} = {size} must be a multiple of {GROUP} for execution.precision = 'fp8'; change"
                " it, or use --config.execution.precision=bf16"
            )


def _nearest_batch(value: float, micro_batch: int) -> str:
    """Return the nearest whole multiples of a micro-batch, as the end of a refusal."""
    if not math.isfinite(value):
        return ""
    below = int(value // micro_batch) * micro_batch
    return f"; the nearest is {f'{below} or ' if below else ''}{below + micro_batch}" if value % micro_batch else ""


def _check_training(config: "Config") -> None:
    shortest = config.model.num_mtp_layers + 2
    if config.data.sequence_length < shortest:
        raise ValueError(
            f"config.data.sequence_length = {config.data.sequence_length} is too short: {config.model.num_mtp_layers}"
            f" MTP layers need at least {shortest}"
        )
    for shape, _, value in config.training.batch_size:
        if shape != "constant" or not value or value % config.training.micro_batch_size:
            raise ValueError(
                f"config.training.batch_size: ({shape!r}, ..., {value}) must be a constant whole multiple of"
                f" micro_batch_size = {config.training.micro_batch_size}: every size is compiled once"
                f"{_nearest_batch(value, config.training.micro_batch_size)}"
            )
    if config.optimizer.b2 > LARGEST_B2:
        raise ValueError(
            f"config.optimizer.b2 = {config.optimizer.b2}: BF16 moments lose updates above {LARGEST_B2}; lower it"
        )
    if not config.data.sources:
        raise ValueError(
            "config.data.sources is empty; name at least one, for example {'path': 'stdlib', 'weight': 1.0}"
        )
    if config.execution.exchange_slack < 1.0:
        raise ValueError(
            f"config.execution.exchange_slack = {config.execution.exchange_slack} must be at least 1: a round carries"
            " the balanced load"
        )
