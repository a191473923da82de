"""The section `posttraining` of a configuration: which stage, and its settings; read as strictly as all others.

A file in `configs/` for post-training is an ordinary configuration with one section more:

    config.posttraining = {"stage": "sft", "sft": {"template": "v3", "epochs": 2.0, "mtp": "detached"}}

`stage` names the driver, and the section has the settings of that stage alone. The ordinary sections stay an ordinary
`Config`, so that everything that reads a workdir reads this one too; the section is in `workdir/posttraining.json`.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.adapters import Lora
from deepseek_jax.config import Config, convert, from_config_dict
from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import read_json, shown
from deepseek_jax.posttraining.distillation_settings import Distillation, check_distillation
from deepseek_jax.posttraining.grpo_settings import Grpo, check_grpo
from deepseek_jax.posttraining.preferences import RewardModel, check_reward_model
from deepseek_jax.training.origin import WHOLE
from deepseek_jax.training.workdir import is_claimed

SECTION = "posttraining"
FILE = "posttraining.json"
WITH_ADAPTERS = ("sft", "grpo")
MTP_MODES = ("joint", "detached", "off")
# Of a run that continues; its length is checked as that of every run.
FREE_KEYS = {
    "sft.epochs",
    "reward_model.epochs",
    "grpo.steps",
    "grpo.rows",
    "grpo.reward_workers",
    "grpo.reward_seconds",
}
FREE_KEYS |= {f"distillation.{key}" for key in ("steps", "rows", "teacher")}  # the teacher's weights have a fingerprint
# Names of folders and files that may move: what is trained on has a fingerprint (what is held out has none, nor has the
# language of a problem). A name of nothing (no adapters, a task) stays none.
MOVING_KEYS: dict[str, Callable[[Any], bool]] = {"lora.initial": bool}
MOVING_KEYS |= dict.fromkeys(
    ("grpo.problems", "distillation.problems", "reward_model.pairs"), lambda name: str(name).endswith(".jsonl")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Supervised fine-tuning on conversations.

    Attributes:
        template: "v3", "r1", "v3.1", "plain" (any tokenizer), "folder" (that of the initial weights), or a .jinja file.
        epochs: passes over the conversations; `training.num_tokens` may end the run before.
        mtp: "joint": MTP layers train as in pre-training; "detached": they alone learn from their loss; "off": they
            do not run.
    """

    template: str
    epochs: float
    mtp: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Posttraining:
    """The whole section; the settings of the stages that it does not name are None.

    With `lora` a run trains adapters on weights that stay as they are; None: it trains all weights.
    """

    stage: str
    sft: Sft | None = None
    grpo: Grpo | None = None
    distillation: Distillation | None = None
    reward_model: RewardModel | None = None
    lora: Lora | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PosttrainingConfig(Config):
    """What a configuration file for post-training holds, for the types of its keys."""

    posttraining: Posttraining


def read(config_dict: Any, initial: str = "") -> tuple[Config, Posttraining]:
    """Convert an `ml_collections.ConfigDict` (or a dict of its shape) strictly.

    Args:
        config_dict: an ordinary configuration, and the section.
        initial: `training.initial_weights`; "" for those of the configuration.

    Raises:
        ValueError: as `config.from_config_dict`, of both parts; no stage of that name, or settings of another.
    """
    tree = dict(config_dict.to_dict() if hasattr(config_dict, "to_dict") else config_dict)
    if SECTION not in tree:
        raise ValueError(
            f"the configuration has no section {SECTION!r}; begin with configs/tiny_sft.py, or use experiments.train"
        )
    posttraining = convert(Posttraining, tree.pop(SECTION), f"config.{SECTION}")
    config = from_config_dict(tree)
    config = config.with_(training={"initial_weights": initial}) if initial else config
    stage, path = posttraining.stage, f"config.{SECTION}"
    if stage not in STAGES:
        raise ValueError(f"{path}.stage = {shown(repr(stage))} is unknown; choose one of {tuple(STAGES)}")
    given = [name for name in STAGES if getattr(posttraining, name) is not None]
    if given != [stage]:
        raise ValueError(f"{path} has the settings of {given} and stage = {stage!r}; give {path}.{stage} alone")
    if not config.training.initial_weights:
        raise ValueError(
            "post-training begins with weights: give --initial, a run's workdir or a folder in Hugging Face's format"
        )
    if config.training.initial_weights.startswith(WHOLE):
        raise ValueError(
            f"training.initial_weights = {shown(config.training.initial_weights)!r} has moments and a position in other"
            f" data; name the weights alone, without {WHOLE!r}"
        )
    STAGES[stage](getattr(posttraining, stage), config)
    if posttraining.lora is not None:
        if stage not in WITH_ADAPTERS:
            raise ValueError(
                f"{path}.lora trains adapters in the stages {WITH_ADAPTERS}, and stage = {stage!r}; leave it out, or"
                f" begin {stage} with a run's merged adapters (experiments.convert_hf export)"
            )
        check_lora(posttraining.lora, config)
        if posttraining.sft and posttraining.sft.mtp == "detached":
            raise ValueError(
                f"{path}.sft.mtp = 'detached' lets MTP layers alone learn from their loss, and they have no adapters;"
                " set it to 'off', or to 'joint'"
            )
    return config, posttraining


def check_sft(sft: Sft, config: Config) -> None:
    """Refuse settings that do not go together or would not do what they say.

    Raises:
        ValueError: for the first fault that is found, with the remedy.
    """
    data, path = config.data, f"config.{SECTION}.sft"
    if not sft.template:
        raise ValueError(f"{path}.template is empty; name a template, 'v3' or 'plain' for example")
    if not (math.isfinite(sft.epochs) and sft.epochs > 0):
        raise ValueError(f"{path}.epochs = {sft.epochs} must be a positive number")
    if sft.mtp not in MTP_MODES:
        raise ValueError(f"{path}.mtp = {shown(repr(sft.mtp))} is unknown; choose one of {MTP_MODES}")
    if sft.mtp != "off" and not config.model.num_mtp_layers:
        raise ValueError(f"{path}.mtp = {sft.mtp!r} and the model has no MTP layers; set it to 'off'")
    if sft.mtp == "detached" and config.mesh.pipe != 1:  # -1 takes the devices that are left
        raise ValueError(
            f"{path}.mtp = 'detached' with config.mesh.pipe = {config.mesh.pipe} is not tested; use"
            " config.mesh.pipe = 1, or mtp = 'joint'"
        )
    if sft.mtp == "off" and config.model.num_mtp_layers and config.optimizer.weight_decay:
        raise ValueError(
            f"{path}.mtp = 'off' and optimizer.weight_decay = {config.optimizer.weight_decay} would shrink MTP layers"
            " that do not learn; set either to another value"
        )
    for name in ("mask_documents", "reset_positions"):
        if not getattr(data, name):
            raise ValueError(
                f"config.data.{name} = False would let packed conversations see each other; set it to True"
            )
    for name in ("fim_rate", "split_rate"):
        if getattr(data, name):
            raise ValueError(f"config.data.{name} = {getattr(data, name)} is for texts, not conversations; set it to 0")
    if data.heldout_fraction >= 1.0:
        raise ValueError("config.data.heldout_fraction = 1 leaves nothing to train on; lower it")
    if weighted := [source.path for source in data.sources if source.weight != 1.0]:
        raise ValueError(
            f"config.data.sources: {shown(weighted[0])!r} has a weight, and every conversation is taken once per epoch;"
            " leave it out, or repeat the file"
        )


def check_lora(lora: Lora, config: Config) -> None:
    """Refuse adapters that could not learn, or whose run would change what adapters cannot hold.

    Raises:
        ValueError: for the first fault that is found, with the remedy.
    """
    path = f"config.{SECTION}.lora"
    if lora.rank < 1:
        raise ValueError(f"{path}.rank = {lora.rank} leaves nothing to train; give 1 or more, or leave out {path}")
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise ValueError(f"{path}.alpha = {lora.alpha} must be a positive number")
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise ValueError(
            f"{path}.targets = {lora.targets} must name some weights, each once; ('attention',) for example"
        )
    if config.mesh.pipe != 1:
        raise ValueError(
            f"config.mesh.pipe = {config.mesh.pipe}: adapters train on a mesh without a pipeline; set it to 1"
        )
    if any(value for _, _, value in config.optimizer.bias_update_rate):
        raise ValueError(
            f"config.optimizer.bias_update_rate = {config.optimizer.bias_update_rate} would move router biases, which"
            f" adapters cannot hold; set it to 0, or leave out {path}"
        )
    if config.optimizer.ema_decay:
        raise ValueError(
            f"config.optimizer.ema_decay = {config.optimizer.ema_decay}: no average of adapters is kept; set it to 0"
        )


def check_claimed(workdir: Path, posttraining: Posttraining) -> None:
    """Refuse a workdir of another kind of run, or of other settings.

    Raises:
        ValueError: it is; the message shows each difference.
    """
    path = workdir / FILE
    if not is_claimed(workdir):
        return
    if not path.exists():
        raise ValueError(
            f"{shown(str(workdir))} holds a run without post-training; choose another --workdir, and begin with its"
            f" weights: --initial={workdir}"
        )
    section = read_json(path)
    if section.get("stage") != posttraining.stage:
        raise ValueError(
            f"{shown(str(workdir))} holds a run of the stage {section.get('stage')!r}, and this is one of"
            f" {posttraining.stage!r}; choose another --workdir, and begin with its weights: --initial={workdir}"
        )
    stored = _defaults(posttraining) | _leaves(section)
    ours = _leaves(json.loads(json.dumps(dataclasses.asdict(posttraining))))
    differences = [
        f"{SECTION}.{key}: {stored.get(key)!r} in the workdir, {ours.get(key)!r} given"
        for key in sorted(stored.keys() | ours.keys())
        if stored.get(key) != ours.get(key) and not _is_free(key, stored.get(key), ours.get(key))
    ]
    if differences:
        raise ValueError(
            f"{shown(str(workdir))} holds a run with other settings; give its values, or another --workdir:\n"
            + "\n".join(differences)
        )


def claim(workdir: Path, posttraining: Posttraining) -> None:
    """Write the section into a workdir; call it just before `claim_workdir`."""
    if jax.process_index() == 0:
        section = dataclasses.asdict(posttraining)
        if posttraining.lora is None:
            del section["lora"]  # the file of a run without adapters is as it was before there were any
        write_atomically(workdir / FILE, json.dumps(section, indent=1) + "\n")


def _is_free(key: str, old: Any, new: Any) -> bool:
    moves = MOVING_KEYS.get(key)
    return key in FREE_KEYS or (moves is not None and moves(old) and moves(new))


def _defaults(posttraining: Posttraining) -> dict[str, Any]:
    """Return what a file that was written before some settings existed means by their absence."""
    settings = {name: getattr(posttraining, name) for name in (*STAGES, "lora")}
    return {
        f"{name}.{field.name}": field.default
        for name, own in settings.items()
        if own is not None
        for field in dataclasses.fields(own)
        if field.default is not dataclasses.MISSING
    }


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if value is None:
            continue
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


# Each stage has a field of its name in `Posttraining`, and a check of its settings.
STAGES: dict[str, Callable[[Any, Config], None]] = {
    "sft": check_sft,
    "grpo": check_grpo,
    "distillation": check_distillation,
    "reward_model": check_reward_model,
}
