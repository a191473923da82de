"""Group relative policy optimisation: rollouts by the engine, rewards by rules, and the step of `Trainer`.

    prompts -> groups of samples -> rewards -> advantages -> updates -> the trainer's weights go to the engine -> ...

Synchronous (`staleness` 0): the engine samples with the weights that the next update begins with, and nothing trains
meanwhile. Above 0 a thread makes rollouts while the trainer trains, by weights that are so many updates older.
`posttraining.policy_batches` has both and makes the batches, `posttraining.policy_objective` is what is minimised.

The thread shares the process and its device with the trainer: both use the one copy of the model that sampling needs in
any case, nothing is sent, and a program that is killed loses both at once. On one accelerator their programs still run
one after the other, so what is hidden there is the host's work: rewards, texts and turns of the engine.

The policy that is trained is the one that was drawn from, at its temperature and among what top-k and top-p kept.
The KL's reference, where the choices have one, is `posttraining.reference`.

The router biases stay while `optimizer.bias_update_rate` is 0, as in the configurations of this stage.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.huggingface.load import abstract_weights
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import expert_mesh
from deepseek_jax.parallel.mesh import axis_size, make_mesh
from deepseek_jax.parameters import EXPERTS, Weights
from deepseek_jax.posttraining.accuracy import accuracy_row
from deepseek_jax.posttraining.beginning import checked, claim_run, tokenizer_and_template
from deepseek_jax.posttraining.grpo_settings import MODEL, PATH, Grpo
from deepseek_jax.posttraining.model_rewards import open_model_rewards
from deepseek_jax.posttraining.policy_batches import PolicyBatches
from deepseek_jax.posttraining.policy_metrics import POLICY_KEYS, policy_row
from deepseek_jax.posttraining.policy_objective import Policy, policy
from deepseek_jax.posttraining.problems import Problems, open_problems
from deepseek_jax.posttraining.reference import Reference, open_reference
from deepseek_jax.posttraining.rewards import rewards_by_name
from deepseek_jax.posttraining.rewards.pool import RewardPool
from deepseek_jax.posttraining.scoring import exact_scores, jit_score, refuse_exact, refuse_mesh, score_rows
from deepseek_jax.posttraining.settings import Posttraining
from deepseek_jax.training.adapted import Parts, adapters_line
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.journal import say
from deepseek_jax.training.loop import Row, Trainer
from deepseek_jax.training.optimizer import batch_size
from deepseek_jax.training.pretrain import Result, begin, open_bar, open_log
from deepseek_jax.training.progress import ProgressBar
from deepseek_jax.training.state import State, weights_of
from deepseek_jax.training.summary import devices_line, model_line, position_line, programs_line, rates_line
from deepseek_jax.training.trainable import open_parts
from deepseek_jax.training.workdir import occupied, read_tokenizer


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
        NotImplementedError: exact arithmetic on a GPU, or on several devices.
        NonFiniteError, SaveError, OSError: as `training.pretrain.train`.
    """
    grpo = posttraining.grpo
    assert grpo is not None
    with contextlib.ExitStack() as resources:
        resources.enter_context(occupied(workdir))
        config = checked(with_steps(config, grpo), posttraining, workdir)
        mesh = _fitting(grpo, mesh or make_mesh(config.mesh))
        tokenizer, template = tokenizer_and_template(config, grpo.template, workdir)
        _check_exact(config, grpo, tokenizer, mesh)
        problems = open_problems(config, grpo, template, tokenizer)
        sampler = _open_sampler(resources)
        pool = resources.enter_context(open_rewards(grpo, problems, mesh))
        resources.enter_context(jax.set_mesh(mesh))
        objective = policy(grpo.choices, config.model, config.loss, config.execution.loss_chunk, grpo.temperature)
        parts, checkpoints, state, progress = _open_state(config, posttraining, objective, workdir, mesh, resources)
        reference = open_reference(config, grpo, parts, mesh, workdir, weights_of(state), progress, resources)
        opened = open_engine(config, grpo, problems, parts.whole(weights_of(state)), tokenizer, mesh)
        engine = resources.enter_context(opened)
        resources.callback(sampler.shutdown, wait=False, cancel_futures=True)
        score = scorer(config, objective, mesh, parts.whole)
        batches = make_batches(config, grpo, problems, engine, pool, score, parts.whole, sampler, reference, progress)
        log = open_log(config, workdir, progress, resources, wandb, POLICY_KEYS)
        claim_run(workdir, config, posttraining, template, parts.base)
        say("\n".join(_lines(config, posttraining, mesh, state["params"], problems, progress)))
        bar = open_bar(config, progress, resources)
        trainer = Trainer(
            config=config,
            mesh=mesh,
            train_step=parts.train_step,
            state=state,
            progress=progress,
            batches=batches,
            evaluators=[functools.partial(_evaluate, batches, bar)],
            checkpoints=checkpoints,
            tokenizer_files=read_tokenizer(workdir),
            log=log,
            bar=bar,
            row=lambda step, metrics, rates: policy_row(grpo.choices, metrics, rates) | batches.row_of(step),
            adapters=parts.weights_met,
        )
        batches.follow(lambda: for_sampling(grpo, weights_of(trainer.state)), bar.note)
        interrupted_by = trainer.run()
        return Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, tokenizer, interrupted_by)


def _fitting(grpo: Grpo, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Return the mesh, if outputs are scored and sampled on it."""
    refuse_mesh(mesh, "GRPO")
    refuse_two_threads(grpo, mesh)
    return mesh


def _check_exact(config: Config, grpo: Grpo, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> None:
    if grpo.is_exact:
        refuse_exact(config, tokenizer, mesh)


def _open_sampler(resources: contextlib.ExitStack) -> ThreadPoolExecutor:
    """Start the thread of the rollouts; open pool and engine behind it, as they end what it waits for."""
    sampler = ThreadPoolExecutor(1, "sampler")
    resources.callback(sampler.shutdown)
    return sampler


def _open_state(
    config: Config,
    posttraining: Posttraining,
    objective: Policy,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    resources: contextlib.ExitStack,
) -> tuple[Parts, Checkpoints, State, Progress]:
    parts = open_parts(config, posttraining.lora, objective, workdir, mesh)
    checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
    resources.callback(checkpoints.close)
    return parts, checkpoints, *begin(checkpoints, config, workdir, mesh, parts.abstract, parts.create)


def with_steps(config: Config, grpo: Grpo) -> Config:
    """Return the configuration with the tokens of `steps` updates, padding included, if that is fewer."""
    num_tokens = grpo.steps * batch_size(config, 0) * config.data.sequence_length
    return config.with_(training={"num_tokens": float(min(num_tokens, config.training.num_tokens))})


def open_rewards(grpo: Grpo, problems: Problems, mesh: jax.sharding.Mesh) -> RewardPool:
    """Start what rewards: rules alone, or with the score of a model."""
    return open_model_rewards(grpo, problems, mesh) if grpo.reward_model else open_pool(grpo)


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
    whole: Callable[[Weights], Weights],
    sampler: Executor,
    reference: Reference | None,
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
        whole=whole,
        exact=functools.partial(exact_scores, engine) if grpo.is_exact else None,
        sampler=sampler,
        length=config.data.sequence_length,
        pad=engine.tokenizer.pad,
        seed=config.seed,
        step=progress.step,
        last=math.ceil(config.training.num_tokens / (batch_size(config, 0) * config.data.sequence_length)),
        reference=reference,
    )
    if progress.data is not None:
        batches.restore(progress.data)
    return batches


def for_sampling(grpo: Grpo, weights: Weights) -> Weights:
    """Return weights that no step overwrites while they sample: with a staleness of 0 there is no step meanwhile."""
    return jax.tree.map(jnp.copy, weights) if grpo.staleness else weights


def refuse_two_threads(grpo: Grpo, mesh: jax.sharding.Mesh) -> None:
    """Refuse two threads on several devices.

    Raises:
        ValueError: programs of both could begin on two devices in two orders, and wait for each other for ever.
    """
    if grpo.staleness and mesh.devices.size > 1:
        raise ValueError(
            f"{PATH}.staleness = {grpo.staleness} needs one device, and the mesh has {mesh.devices.size}: the"
            " collectives of trainer and sampler could wait for each other; set it to 0, or config.mesh to one device"
        )


def open_engine(
    config: Config, grpo: Grpo, problems: Problems, weights: Weights, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Engine:
    """Open an engine on as many devices as the mesh has, whose experts are as far apart.

    Raises:
        ValueError, NotImplementedError: as `scoring.refuse_exact`.
    """
    _check_exact(config, grpo, tokenizer, mesh)
    longest = max(len(prompt.ids) for prompt in problems.train + problems.heldout)
    experts = axis_size(mesh, EXPERTS)
    decoding = expert_mesh(config.model, experts, mesh.devices.size // experts)
    most = longest + grpo.max_new_tokens
    return Engine.open(
        config, weights, tokenizer, decoding, num_rows=grpo.rows, num_positions=most, exact=grpo.is_exact, bulk=True
    )


def scorer(
    config: Config, objective: Policy, mesh: jax.sharding.Mesh, whole: Callable[[Weights], Weights]
) -> Callable[[Weights, dict[str, Any]], Any]:
    """Return what `PolicyBatches.score` is."""
    program = jit_score(config, objective, mesh)

    def score(weights: Weights, batch: dict[str, Any]) -> Any:
        with jax.set_mesh(mesh):  # which each thread has of its own
            return score_rows(program, whole(weights), batch, config.training.micro_batch_size, mesh)

    return score


def _evaluate(batches: PolicyBatches, bar: ProgressBar, weights: Weights) -> Row:
    grpo = batches.grpo
    problems = batches.problems.heldout
    asked = accuracy_row, batches.engine, batches.pool, problems, grpo.accuracy, grpo.max_new_tokens
    weights = batches.whole(weights)
    row = batches.sampler.submit(*asked, weights).result()  # in its turn: it changes the engine's weights
    bar.note(
        f"{row['eval/accuracy']:.1%} of {row['eval/problems']} held-out problems right"
        f" (95%: {row['eval/accuracy_low']:.1%} to {row['eval/accuracy_high']:.1%})"
    )
    return row


def _lines(config, posttraining: Posttraining, mesh, params, problems: Problems, progress: Progress) -> list[str]:
    grpo, lora, size = posttraining.grpo, posttraining.lora, batch_size(config, 0)
    assert grpo is not None
    rows = [
        ("model", model_line(config, abstract_weights(config, mesh).params if lora else params)),
        *([("adapters", adapters_line(lora, params))] if lora else []),
        ("problems", f"{grpo.problems}: {len(problems.train):,} to train on, {len(problems.heldout):,} held out"),
        (
            "rollouts",
            f"{size * grpo.updates // grpo.group_size:,} prompts, {grpo.group_size} samples each of at most"
            f" {grpo.max_new_tokens:,} tokens; {grpo.updates} updates of {size:,}; {grpo.steps:,} in all",
        ),
        ("method", f"{grpo.variant} {grpo.overrides or ''}; rewards {grpo.rewards}; staleness {grpo.staleness}"),
        ("sampling", f"{grpo.drawing}; {grpo.arithmetic} arithmetic{', routes replayed' * grpo.replay_routes}"),
        ("rates", rates_line(config)),
        ("devices", devices_line(mesh)),
        ("programs", programs_line(config, mesh)),
    ]
    return [f"{config.name}:", *(f"  {name:<10}{text}" for name, text in rows), position_line(config, progress)]
