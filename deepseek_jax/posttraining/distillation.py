"""On-policy distillation: the student answers, the teacher judges each of its tokens, and the step of `Trainer`.

    prompts -> answers of the student, by the engine -> the teacher's hidden states of them -> one update -> ...

`posttraining.distillation_objective` is what is minimised, with the choice of the estimator. Each update has answers of
its own, drawn at temperature 1 without top-p by the weights that it begins with, so nothing is off-policy and no ratio
is needed. No reward is read but for the measurement of held-out accuracy.

The teacher is read at every start and never written. A checkpoint has the number of the next prompt, and the teacher's
fingerprint: a run that continues with another teacher, or other problems, is refused. Draws depend on the seed, the
prompt's number and the place in its group alone, so a killed run ends with the bits of the uninterrupted one.
"""

import contextlib
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.inference.engine import Engine
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.posttraining.accuracy import accuracy_line, accuracy_row
from deepseek_jax.posttraining.beginning import checked, claim_run, tokenizer_and_template
from deepseek_jax.posttraining.distillation_objective import distillation, distillation_step
from deepseek_jax.posttraining.distillation_settings import Teacher, check_same_tokens, find_teacher, own_names
from deepseek_jax.posttraining.grpo import open_engine, open_pool, with_steps
from deepseek_jax.posttraining.grpo_settings import Grpo
from deepseek_jax.posttraining.problems import Problems, open_problems
from deepseek_jax.posttraining.rewards.pool import RewardPool
from deepseek_jax.posttraining.scoring import refuse_mesh
from deepseek_jax.posttraining.settings import Posttraining
from deepseek_jax.posttraining.student_answers import DISTILLATION_KEYS, UPDATE, Answers
from deepseek_jax.training.adapted import StepOnBase
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.fingerprint import fingerprints
from deepseek_jax.training.journal import say
from deepseek_jax.training.loop import Row, Trainer
from deepseek_jax.training.metrics import update_row
from deepseek_jax.training.optimizer import Rates, batch_size
from deepseek_jax.training.origin import initial_state, read_origin
from deepseek_jax.training.pretrain import Result, begin, open_bar, open_log
from deepseek_jax.training.progress import ProgressBar
from deepseek_jax.training.state import abstract_state, weights_of
from deepseek_jax.training.step import recipe_of
from deepseek_jax.training.summary import devices_line, model_line, position_line, programs_line, rates_line
from deepseek_jax.training.workdir import occupied, read_tokenizer


def train_distillation(
    config: Config, posttraining: Posttraining, workdir: Path, mesh: jax.sharding.Mesh | None = None, wandb: str = ""
) -> Result:
    """Train a student in `workdir`, from its newest intact checkpoint or from `training.initial_weights`.

    The arguments are those of `grpo.train_grpo`; `config` is the student's.

    Raises:
        ValueError: bad input, a teacher that does not fit, `workdir` belongs to another run, or another process trains
            there.
        NonFiniteError, SaveError, OSError: as `training.pretrain.train`.
    """
    settings = posttraining.distillation
    assert settings is not None
    with contextlib.ExitStack() as resources:
        resources.enter_context(occupied(workdir))
        grpo = settings.rollouts
        config = checked(with_steps(config, grpo), posttraining, workdir)
        mesh = mesh or make_mesh(config.mesh)
        refuse_mesh(mesh, "distillation")
        teacher = find_teacher(settings, config)
        tokenizer, template = tokenizer_and_template(config, settings.template, workdir)
        check_same_tokens(settings, teacher.tokenizer, read_tokenizer(workdir))
        with own_names():
            problems = open_problems(config, grpo, template, tokenizer)
        pool = resources.enter_context(open_pool(grpo))
        resources.enter_context(jax.set_mesh(mesh))
        step, taught_by = open_teacher(config, teacher, mesh)
        checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
        resources.callback(checkpoints.close)
        create = functools.partial(initial_state, config, workdir, mesh)
        state, progress = begin(checkpoints, config, workdir, mesh, abstract_state(config, mesh), create)
        engine = resources.enter_context(open_engine(config, grpo, problems, weights_of(state), tokenizer, mesh))
        batches = Answers(grpo, problems, engine, config.data.sequence_length, config.seed, taught_by)
        if progress.data is not None:
            batches.restore(progress.data)
        log = open_log(config, workdir, progress, resources, wandb, DISTILLATION_KEYS)
        claim_run(workdir, config, posttraining, template)
        say("\n".join(_lines(config, teacher, grpo, mesh, state["params"], problems, progress)))
        bar = open_bar(config, progress, resources)
        trainer = Trainer(
            config=config,
            mesh=mesh,
            train_step=step,
            state=state,
            progress=progress,
            batches=batches,
            evaluators=[functools.partial(_evaluate, engine, pool, problems, grpo, bar)],
            checkpoints=checkpoints,
            tokenizer_files=read_tokenizer(workdir),
            log=log,
            bar=bar,
            row=lambda step, metrics, rates: _update_row(metrics, rates) | batches.row_of(step),
        )
        batches.follow(lambda: weights_of(trainer.state), progress.step)
        interrupted_by = trainer.run()
        return Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, tokenizer, interrupted_by)


def open_teacher(config: Config, teacher: Teacher, mesh: jax.sharding.Mesh) -> tuple[Any, str]:
    """Read the teacher; return the student's step with its weights, and their fingerprint. Call under `set_mesh`."""
    recipes = [
        recipe_of(each, distillation(each.model, config.loss, config.execution.loss_chunk), mesh)
        for each in (config, teacher.config)
    ]
    weights = read_origin(teacher.config, mesh, whole=False).weights
    text = json.dumps(fingerprints(dict(weights._asdict())), sort_keys=True)
    step = jit_on(distillation_step, recipes[0].execution, mesh, *recipes, donate=(1,), trains=True)
    return StepOnBase(step, weights), hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _evaluate(engine: Engine, pool: RewardPool, problems: Problems, grpo: Grpo, bar: ProgressBar, weights) -> Row:
    row = accuracy_row(engine, pool, problems.heldout, grpo.accuracy, grpo.max_new_tokens, weights)
    bar.note(accuracy_line(row))
    return row


def _update_row(metrics: dict[str, Any], rates: Rates) -> Row:
    return {f"distillation/{name}": metrics[name] for name in UPDATE} | update_row(metrics, rates)


def _lines(config, teacher: Teacher, grpo: Grpo, mesh, params, problems: Problems, progress) -> list[str]:
    size = batch_size(config, 0)
    rows = [
        ("student", model_line(config, params)),
        (
            "teacher",
            f"{teacher.config.training.initial_weights}: {teacher.config.model.num_layers} layers of width"
            f" {teacher.config.model.width}",
        ),
        ("problems", f"{grpo.problems}: {len(problems.train):,} to train on, {len(problems.heldout):,} held out"),
        (
            "answers",
            f"{size:,} an update, {grpo.group_size} to a prompt, of at most {grpo.max_new_tokens:,} tokens;"
            f" {grpo.steps:,} updates",
        ),
        ("rates", rates_line(config)),
        ("devices", devices_line(mesh)),
        ("programs", programs_line(config, mesh)),
    ]
    return [f"{config.name}:", *(f"  {name:<10}{text}" for name, text in rows), position_line(config, progress)]
