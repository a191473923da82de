"""Group relative policy optimisation: rollouts by the engine, rewards by rules, and the step of `Trainer`.

    prompts -> groups of samples -> rewards -> advantages -> updates -> the trainer's weights go to the engine -> ...

Synchronous: the engine samples with the weights that the next update begins with, and nothing trains meanwhile.
`posttraining.policy_batches` makes the batches, `posttraining.policy_objective` is what is minimised.

Samples are drawn at temperature 1 without top-p, so that the policy that is trained is the one that was drawn from.
The reference of the KL, where the choices have one, is the weights that the run began with, for the whole run. A run
that continues reads them again, and refuses others by a fingerprint. To refresh it, begin another run with this one's
weights (R1 does so every 400 steps).

The router biases stay while `optimizer.bias_update_rate` is 0, as in the configurations of this stage.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import expert_mesh
from deepseek_jax.parallel.mesh import axis_size, make_mesh
from deepseek_jax.parameters import EXPERTS, Weights
from deepseek_jax.posttraining.accuracy import accuracy_row
from deepseek_jax.posttraining.beginning import keep_template, tokenizer_and_template
from deepseek_jax.posttraining.grpo_settings import MODEL, Grpo
from deepseek_jax.posttraining.model_rewards import open_model_rewards
from deepseek_jax.posttraining.policy_batches import PolicyBatches
from deepseek_jax.posttraining.policy_metrics import POLICY_KEYS, policy_row
from deepseek_jax.posttraining.policy_objective import Policy, policy
from deepseek_jax.posttraining.problems import Problems, open_problems
from deepseek_jax.posttraining.rewards import rewards_by_name
from deepseek_jax.posttraining.rewards.pool import RewardPool
from deepseek_jax.posttraining.scoring import jit_score, refuse_mesh, score_rows
from deepseek_jax.posttraining.settings import Posttraining, check_claimed, claim
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.continuation import check_one_step
from deepseek_jax.training.fingerprint import fingerprints
from deepseek_jax.training.journal import say
from deepseek_jax.training.loop import Row, Trainer
from deepseek_jax.training.optimizer import batch_size
from deepseek_jax.training.origin import initial_state, read_origin
from deepseek_jax.training.pretrain import Result, begin, open_bar, open_log
from deepseek_jax.training.progress import ProgressBar
from deepseek_jax.training.state import abstract_state, weights_of
from deepseek_jax.training.step import jit_train_step
from deepseek_jax.training.summary import devices_line, model_line, position_line, programs_line, rates_line
from deepseek_jax.training.workdir import check_workdir, claim_workdir, occupied, read_tokenizer


def train_grpo(
    config: Config, posttraining: Posttraining, workdir: Path, mesh: jax.sharding.Mesh | None = None, wandb: str = ""
) -> Result:
    """Train a policy in `workdir`, from its newest intact checkpoint or from `training.initial_weights`.

    Args:
        config: as `settings.read` returns it.
        posttraining: with the settings of this stage.
        workdir: the run's folder; made if it does not exist.
        mesh: to train on; by default that of `config`, over all devices.
        wandb: a project of Weights & Biases to show the metrics in, too; none if "".

    Raises:
        ValueError: bad input, `workdir` belongs to another run, or another process trains there.
        RewardError: a reward failed, and `on_failure` is "stop". The last checkpoint stays.
        NonFiniteError, SaveError, OSError: as `training.pretrain.train`.
    """
    grpo = posttraining.grpo
    assert grpo is not None
    with contextlib.ExitStack() as resources:
        resources.enter_context(occupied(workdir))
        config = _checked(with_steps(config, grpo), posttraining, workdir)
        mesh = mesh or make_mesh(config.mesh)
        refuse_mesh(mesh)
        tokenizer, template = tokenizer_and_template(config, grpo.template, workdir)
        problems = open_problems(config, grpo, template, tokenizer)
        pool = resources.enter_context(open_model_rewards(grpo, mesh) if grpo.reward_model else open_pool(grpo))
        resources.enter_context(jax.set_mesh(mesh))
        objective = policy(grpo.choices, config.model, config.loss, config.execution.loss_chunk)
        checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
        resources.callback(checkpoints.close)
        create = functools.partial(initial_state, config, workdir, mesh)
        state, progress = begin(checkpoints, config, workdir, mesh, abstract_state(config, mesh), create)
        reference = reference_weights(config, grpo, mesh, weights_of(state), progress)
        engine = resources.enter_context(open_engine(config, grpo, problems, weights_of(state), tokenizer, mesh))
        score = scorer(config, objective, mesh, reference)
        batches = make_batches(config, grpo, problems, engine, pool, score, reference, progress)
        log = open_log(config, workdir, progress, resources, wandb, POLICY_KEYS)
        keep_template(workdir, template)
        claim(workdir, posttraining)
        claim_workdir(workdir, config)
        say("\n".join(_lines(config, grpo, mesh, state["params"], problems, progress)))
        bar = open_bar(config, progress, resources)
        trainer = Trainer(
            config=config,
            mesh=mesh,
            train_step=jit_train_step(config, objective, mesh),
            state=state,
            progress=progress,
            batches=batches,
            evaluators=[functools.partial(_evaluate, batches, bar)],
            checkpoints=checkpoints,
            tokenizer_files=read_tokenizer(workdir),
            log=log,
            bar=bar,
            row=lambda step, metrics, rates: policy_row(grpo.choices, metrics, rates) | batches.row_of(step),
        )
        batches.follow(lambda: weights_of(trainer.state))
        interrupted_by = trainer.run()
        return Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, tokenizer, interrupted_by)


def _checked(config: Config, posttraining: Posttraining, workdir: Path) -> Config:
    """Return the configuration, which `workdir` may go on with."""
    check_claimed(workdir, posttraining)
    check_workdir(workdir, config)
    check_one_step(config)
    return config


def with_steps(config: Config, grpo: Grpo) -> Config:
    """Return the configuration with the tokens of `steps` updates, padding included, if that is fewer."""
    num_tokens = grpo.steps * batch_size(config, 0) * config.data.sequence_length
    return config.with_(training={"num_tokens": float(min(num_tokens, config.training.num_tokens))})


def open_pool(grpo: Grpo) -> RewardPool:
    """Start the processes of the rewards by rules."""
    rules = {name: float(weight) for name, weight in grpo.rewards.items() if name != MODEL}
    return RewardPool(
        rewards_by_name([*rules]),
        rules,
        num_workers=grpo.reward_workers,
        seconds=grpo.reward_seconds,
        on_failure=grpo.on_failure,
    )


def make_batches(
    config: Config,
    grpo: Grpo,
    problems: Problems,
    engine: Engine,
    pool: RewardPool,
    score: Callable,
    reference: Weights | None,
    progress: Progress,
) -> PolicyBatches:
    """Return the batches, at the run's position.

    Raises:
        ValueError: the run's checkpoint is of other problems, or of another reference.
    """
    batches = PolicyBatches(
        grpo=grpo,
        choices=grpo.choices,
        problems=problems,
        engine=engine,
        pool=pool,
        score=score,
        length=config.data.sequence_length,
        pad=engine.tokenizer.pad,
        seed=config.seed,
        step=progress.step,
        reference=_name(reference) if reference else "",
    )
    if progress.data is not None:
        batches.restore(progress.data)
    return batches


def reference_weights(
    config: Config, grpo: Grpo, mesh: jax.sharding.Mesh, weights: Weights, progress: Progress
) -> Weights | None:
    """Return the weights that the run began with, if the choices have a KL; the caller keeps them.

    Raises:
        ValueError: the run continues, and `training.initial_weights` cannot be read any more.
    """
    if not grpo.choices.kl_weight:
        return None
    if progress.step:
        return read_origin(config, mesh, whole=False).weights
    return jax.tree.map(jnp.copy, weights)  # a step overwrites those of the state


def open_engine(
    config: Config, grpo: Grpo, problems: Problems, weights: Weights, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Engine:
    """Open an engine on as many devices as the mesh has, whose experts are as far apart."""
    longest = max(len(prompt.ids) for prompt in problems.train + problems.heldout)
    experts = axis_size(mesh, EXPERTS)
    decoding = expert_mesh(config.model, experts, mesh.devices.size // experts)
    most = longest + grpo.max_new_tokens
    return Engine.open(config, weights, tokenizer, decoding, num_rows=grpo.rows, num_positions=most)


def scorer(
    config: Config, objective: Policy, mesh: jax.sharding.Mesh, reference: Weights | None
) -> Callable[[Weights | None, dict[str, Any]], Any]:
    """Return what `PolicyBatches.score` is."""
    program = jit_score(config, objective, mesh)

    def score(weights: Weights | None, batch: dict[str, Any]) -> Any:
        chosen: Any = reference if weights is None else weights
        return score_rows(program, chosen, batch, config.training.micro_batch_size, mesh)

    return score


def _evaluate(batches: PolicyBatches, bar: ProgressBar, weights: Weights) -> Row:
    grpo = batches.grpo
    row = accuracy_row(
        batches.engine, batches.pool, batches.problems.heldout, grpo.accuracy, grpo.max_new_tokens, weights
    )
    bar.note(
        f"{row['eval/accuracy']:.1%} of {row['eval/problems']} held-out problems right"
        f" (95%: {row['eval/accuracy_low']:.1%} to {row['eval/accuracy_high']:.1%})"
    )
    return row


def _name(weights: Weights) -> str:
    text = json.dumps(fingerprints(dict(weights._asdict())), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _lines(config, grpo: Grpo, mesh, params, problems: Problems, progress: Progress) -> list[str]:
    size = batch_size(config, 0)
    rows = [
        ("model", model_line(config, params)),
        ("problems", f"{grpo.problems}: {len(problems.train):,} to train on, {len(problems.heldout):,} held out"),
        (
            "rollouts",
            f"{size * grpo.updates // grpo.group_size:,} prompts, {grpo.group_size} samples each of at most"
            f" {grpo.max_new_tokens:,} tokens; {grpo.updates} updates of {size:,}; {grpo.steps:,} in all",
        ),
        ("method", f"{grpo.variant} {grpo.overrides or ''}; rewards {grpo.rewards}"),
        ("rates", rates_line(config)),
        ("devices", devices_line(mesh)),
        ("programs", programs_line(config, mesh)),
    ]
    return [f"{config.name}:", *(f"  {name:<10}{text}" for name, text in rows), position_line(config, progress)]
