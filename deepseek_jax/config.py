"""Configuration: frozen dataclasses, and the one strict way from a `ConfigDict` into them.

The dataclasses have no defaults, but for keys that came later: each file in `configs/` is complete, so it says
everything that its run does. `from_config_dict` refuses unknown and missing keys, wrong types and impossible values
(`config_checks.py`), each with value and remedy, before any array exists.
"""

import dataclasses
import typing
from typing import Any

from deepseek_jax.config_bounds import expand_paths
from deepseek_jax.config_checks import check, present, unknown_key
from deepseek_jax.inputs import shown
from deepseek_jax.schedule import Schedule, check_schedule, from_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) of the rotary part."""

    enabled: bool
    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Shape and mathematics of the network; `configs/deepseek_v3.py` comments on the values."""

    vocab_size: int
    width: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    query_latent: int
    kv_latent: int
    content_dim: int
    rotary_dim: int
    value_dim: int
    dense_hidden: int
    num_experts: int
    num_shared_experts: int
    experts_per_token: int
    expert_hidden: int
    num_groups: int
    num_kept_groups: int
    gate: str
    group_score: str
    normalize_gates: bool
    routed_scale: float
    num_mtp_layers: int
    rope_base: float
    yarn: Yarn
    norm_eps: float
    init_std: float
    residual_init_scale: float

    @property
    def num_moe_layers(self) -> int:
        """Main-model layers with routed experts; MTP layers come on top."""
        return self.num_layers - self.num_dense_layers

    @property
    def routed_layers(self) -> tuple[str, ...]:
        """Names of the layers with a router, in the order of metrics: the main model's, then MTP's by depth."""
        main = [f"layer {index}" for index in range(self.num_dense_layers, self.num_layers)]
        return tuple(main + [f"MTP {depth}" for depth in range(1, self.num_mtp_layers + 1)])

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of the matrices that write into the residual stream."""
        return self.init_std * self.residual_init_scale

    @property
    def query_dim(self) -> int:
        """Width of one head's query and key: content and rotary channels."""
        return self.content_dim + self.rotary_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Weights of the loss terms."""

    mtp_weight: Schedule
    sequence_balance_weight: float
    batch_balance_weight: float
    balance_frequency: str
    z_loss_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, its schedules, and the router-bias update."""

    learning_rate: Schedule
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    bias_update_rate: Schedule
    ema_decay: float
    learning_rate_factor: float = 1.0
    ema_memory: str = "device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus of the mixture.

    `path` takes the forms that docs/data.md lists. `text_field` is the key or column of the text; "" stands for
    `data.text_field`. It and the weight may be absent.
    """

    path: str
    weight: float = 1.0
    text_field: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Corpus, tokenizer and packing."""

    sources: tuple[Source, ...]
    text_field: str
    on_error: str
    tokenizer: str
    sequence_length: int
    heldout_fraction: float
    fim_rate: float
    split_rate: float
    mask_documents: bool
    reset_positions: bool
    prefetch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Length of the run, batch sizes, and how often the loop logs, evaluates and saves."""

    num_tokens: float
    batch_size: Schedule
    micro_batch_size: int
    log_every: int
    eval_every: int
    eval_batches: int
    checkpoint_every: int
    keep_checkpoints: int
    max_skipped_steps: int
    initial_weights: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes; one may be -1: what the others leave. `tensor` is reserved and must be 1."""

    pipe: int
    data: int
    node: int
    expert: int
    tensor: int
    context: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the same mathematics is carried out."""

    precision: str
    remat: str
    scan_unroll: int
    gather: str
    attention: str
    attention_chunk: int
    exchange: str
    exchange_slack: float
    interleave: int
    experts: str
    expert_block: int
    expert_wave: int
    loss_chunk: int
    schedule: str = "1f1b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Hashable, so it is a static argument of the jitted functions."""

    name: str
    seed: int
    model: Model
    loss: Loss
    optimizer: Optimizer
    data: Data
    training: Training
    mesh: Mesh
    execution: Execution

    def with_(self, **changes: Any) -> "Config":
        """Return a copy with other values: `config.with_(name="b", execution={"precision": "fp8"})`.

        A section takes a dict of its changed values, or a whole new section. Nothing is checked here: the values of a
        user come through `from_config_dict`.
        """
        changed = {
            key: dataclasses.replace(getattr(self, key), **value) if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **changed)


def from_config_dict(config_dict) -> Config:
    """Convert an `ml_collections.ConfigDict` (or a dict of its shape) strictly.

    Raises:
        ValueError: unknown, missing or ill-typed key, or an impossible shape; the message names the value and the
            remedy.
    """
    tree = config_dict.to_dict() if hasattr(config_dict, "to_dict") else config_dict
    config = expand_paths(convert(Config, tree, "config"))
    check(config, flatten(config))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested plain dicts; `from_config_dict(to_dict(config)) == config`, through JSON too."""
    return dataclasses.asdict(config)


def convert(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind` (a dataclass, a tuple type or a scalar), or raise with `path`."""
    kind = present(kind)
    if kind is Source and isinstance(value, str):
        value = {"path": value}  # as from --config.data.sources=my/texts
    if dataclasses.is_dataclass(kind):
        return _convert_section(kind, value, path)
    if kind == Schedule:
        value = from_number(value)
        if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str):
            raise ValueError(
                f"{path} = {shown(value[0])} is not a number and must be a sequence of pieces otherwise; write 1e-3, or"
                " a tuple of (shape, end, value)"
            )
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} = {shown(repr(value))} must be a sequence; write a tuple")
        parts = typing.get_args(kind)
        if len(parts) == 2 and parts[1] is Ellipsis:
            parts = (parts[0],) * len(value)
        elif len(parts) != len(value):
            raise ValueError(
                f"{path} = {shown(repr(value))} must have {len(parts)} entries: shape, end fraction, value"
            )
        items = tuple(
            convert(part, item, f"{path}[{i}]") for i, (part, item) in enumerate(zip(parts, value, strict=True))
        )
        if kind == Schedule:
            check_schedule(path, items)
        return items
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise ValueError(f"{path} = {shown(repr(value))} is a {type(value).__name__}; it must be a {kind.__name__}")
    return value


def _convert_section(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} = {shown(repr(value))} must be a section with the keys"
            f" {[field.name for field in dataclasses.fields(kind)]}"
        )
    fields = typing.get_type_hints(kind)
    for key in value:
        if key not in fields:
            raise ValueError(unknown_key(path, str(key), fields))
    optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    missing = [key for key in fields if key not in value and key not in optional]
    if missing:
        raise ValueError(f"{path} lacks {missing}; start from configs/deepseek_v3.py, which has every key")
    return kind(**{key: convert(fields[key], value[key], f"{path}.{key}") for key in fields if key in value})


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{"model.width": 7168, ...}`: one dotted key per value."""
    leaves = {}
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), prefix + field.name
        leaves |= flatten(value, path + ".") if dataclasses.is_dataclass(value) else {path: value}
    return leaves
