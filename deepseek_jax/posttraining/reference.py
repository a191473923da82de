"""The reference of GRPO's KL: the weights that the run began with, or since `reference_every` updates its own policy.

R1 replaces the reference by the policy every 400 steps (arXiv 2501.12948, section 2.3.1): a KL to where the run began
would hold a long run back, and none would let it drift. Update n = every, 2 x every, ... is the first behind a new one;
a rollout has the reference of the moment at which it begins.

Of a run of adapters the reference is adapters, too, beside the one base: those that it began with. Where their B is
zero that is the base without its adapters, by the program of the policy, so its KL is exactly 0 before the first
update.

A checkpoint of the run does not hold the reference. The first one is read from `training.initial_weights` (adapters
from `lora.initial`), which may move and have to stay. Later ones are checkpoints in `workdir/reference`, each written
before the first checkpoint of the run that needs it, and kept for as long as one does. A run that continues refuses
another reference than it had, by a fingerprint.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.grpo_settings import Grpo
from deepseek_jax.training.adapted import Parts
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.fingerprint import fingerprints
from deepseek_jax.training.saved import CHECKPOINTS, stored_steps
from deepseek_jax.training.workdir import REFERENCE, read_tokenizer


@dataclasses.dataclass(kw_only=True)
class Reference:
    """Weights that the policy is compared with.

    Attributes:
        weights: as a state has them; no step overwrites them.
        name: a fingerprint of them.
        every: updates between two references; 0: the first stays.
        keep: writes weights and the number of their updates, and returns once they are on disk.
        step: updates that the weights have had; 0: the run began with them.
    """

    weights: Weights
    name: str
    every: int = 0
    keep: Callable[[Weights, int], None] | None = None
    step: int = 0

    def __post_init__(self):
        """Begin with a reference that is on disk."""
        self.kept_step = self.step

    def is_due(self, step: int) -> bool:
        """Return whether the policy of so many updates is to become the reference."""
        return bool(self.every) and step > self.step and step % self.every == 0

    def replace(self, step: int, weights: Weights) -> None:
        """Take a copy of the policy of so many updates."""
        self.weights, self.step = jax.tree.map(jnp.copy, weights), step
        self.name = name_of(self.weights)

    def state(self) -> dict[str, Any]:
        """Return what a position has (JSON); the weights are on disk by then."""
        if self.step != self.kept_step:
            assert self.keep is not None, "only a reference that is replaced has updates"
            self.keep(self.weights, self.step)
            self.kept_step = self.step
        return {"reference": self.name, "reference_step": self.step}

    def check(self, position: dict[str, Any]) -> None:
        """Refuse a position of another reference.

        Raises:
            ValueError: it is; the remedy is in the message.
        """
        if position["reference"] == self.name:
            return
        if self.step:
            raise ValueError(
                f"the KL reference in {REFERENCE} is not the policy of step {self.step} that this run compared with;"
                " put that folder back, or begin another run with --initial"
            )
        raise ValueError(
            "posttraining.lora.initial or training.initial_weights are other weights than this run began with, and the"
            " KL reference is those; put them back, name their step ('workdir@step'), or begin another run with"
            " --initial"
        )


def name_of(weights: Weights) -> str:
    """Return a fingerprint of weights, equal on every mesh."""
    text = json.dumps(fingerprints(dict(weights._asdict())), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def open_reference(
    config: Config,
    grpo: Grpo,
    parts: Parts,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    weights: Weights,
    progress: Progress,
    resources: contextlib.ExitStack,
) -> Reference | None:
    """Return the reference of a run at `progress`, if the choices have a KL.

    Args:
        config: of the run.
        grpo: its settings.
        parts: what it trains.
        mesh: of the weights.
        workdir: of the run.
        weights: of the policy; a run that begins compares with a copy of them.
        progress: where the run stands.
        resources: closes what is opened.

    Raises:
        ValueError: the run continues, and its reference cannot be read any more.
    """
    if not grpo.choices.kl_weight:
        return None
    step = progress.data.get("reference_step", 0) if progress.data else 0
    if not grpo.reference_every:
        found = parts.origin() if progress.step else _copy(weights)
        return Reference(weights=found, name=name_of(found))
    _forget_behind(workdir / REFERENCE, step)
    checkpoints = Checkpoints(workdir / REFERENCE, config.training.keep_checkpoints + 2)  # of two more in the making
    resources.callback(checkpoints.close)

    def keep(weights: Weights, step: int) -> None:
        record = Progress(step=step, tokens_seen=0, data=None)
        checkpoints.save(dict(weights._asdict()), record, config, read_tokenizer(workdir), mesh)
        checkpoints.wait()

    if step:
        if step not in checkpoints.steps():
            raise ValueError(f"{workdir / REFERENCE} lacks the KL reference of step {step}; put it back")
        restored = checkpoints.restore({name: parts.abstract[name] for name in Weights._fields}, mesh, step)
        assert restored is not None, "it is there"
        found = Weights(**restored[0])
    else:
        found = parts.origin() if progress.step else _copy(weights)
    return Reference(weights=found, name=name_of(found), every=grpo.reference_every, keep=keep, step=step)


def _copy(weights: Weights) -> Weights:
    return jax.tree.map(jnp.copy, weights)  # a step overwrites those of the state


def _forget_behind(folder: Path, step: int) -> None:
    """Remove references that no checkpoint of the run has: it died before the one that would have had them."""
    if not step:
        shutil.rmtree(folder, ignore_errors=True)
    for number in stored_steps(folder):
        if number > step:
            shutil.rmtree(folder / CHECKPOINTS / str(number))
