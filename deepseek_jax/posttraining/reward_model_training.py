"""The training of a reward model: `posttraining.reward_model`'s loss of pairs around the same `Trainer`.

    pairs of a file -> rows -> the step of pre-training with another objective -> the same checkpoints

Its workdir is that of every run; GRPO reads it where `posttraining.grpo.reward_model` names it.
"""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.beginning import claim_run, tokenizer_and_template
from deepseek_jax.posttraining.preferences import PairBatches, Pairs, heldout_row, read_pairs, with_length
from deepseek_jax.posttraining.reward_model import preferences, score_answers, score_program
from deepseek_jax.posttraining.scoring import refuse_mesh
from deepseek_jax.posttraining.settings import Posttraining, check_claimed
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.continuation import check_one_step
from deepseek_jax.training.journal import say
from deepseek_jax.training.loop import Row, Trainer
from deepseek_jax.training.metrics import KEYS, update_row
from deepseek_jax.training.optimizer import Rates
from deepseek_jax.training.origin import initial_state
from deepseek_jax.training.pretrain import Result, begin, open_bar, open_log
from deepseek_jax.training.progress import ProgressBar
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import jit_train_step
from deepseek_jax.training.summary import devices_line, length_line, model_line, position_line, rates_line
from deepseek_jax.training.workdir import check_workdir, occupied, read_tokenizer

UPDATE = {
    "loss": "minus the mean log-probability of the preferences (Bradley-Terry), nats per pair; ln 2 knows nothing",
    "accuracy": "share of the update's pairs whose preferred answer has the higher score",
    "margin": "mean score of preferred answers less that of the others",
    "score_rms": "root of the mean square of the scores",
    "pairs": "of this update",
}
REWARD_MODEL_KEYS = KEYS | {f"reward_model/{key}": text for key, text in UPDATE.items()}
REWARD_MODEL_KEYS |= {
    "eval/pair_loss": "the loss over held-out pairs",
    "eval/pair_accuracy": "share of held-out pairs whose preferred answer has the higher score",
    "eval/margin": "mean score of held-out preferred answers less that of the others",
    "eval/pairs": "held-out pairs",
}


def train_reward_model(
    config: Config, posttraining: Posttraining, workdir: Path, mesh: jax.sharding.Mesh | None = None, wandb: str = ""
) -> Result:
    """Train a reward model in `workdir`, from its newest intact checkpoint or from `training.initial_weights`.

    The arguments are those of `sft.train_sft`.

    Raises:
        ValueError: bad input, `workdir` belongs to another run, or another process trains there.
        NonFiniteError, SaveError, OSError: as `training.pretrain.train`.
    """
    settings = posttraining.reward_model
    assert settings is not None
    with contextlib.ExitStack() as resources:
        resources.enter_context(occupied(workdir))
        check_claimed(workdir, posttraining)
        tokenizer, template = tokenizer_and_template(config, settings.template, workdir)
        length = config.data.sequence_length
        pairs = read_pairs(settings, length, template, tokenizer)
        config = with_length(config, settings, pairs)
        check_workdir(workdir, config)
        check_one_step(config)
        mesh = mesh or make_mesh(config.mesh)
        refuse_mesh(mesh, "the training of a reward model")
        resources.enter_context(jax.set_mesh(mesh))
        objective = preferences(config.model, config.loss, tokenizer.eos)
        checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
        resources.callback(checkpoints.close)
        create = functools.partial(initial_state, config, workdir, mesh)
        state, progress = begin(checkpoints, config, workdir, mesh, abstract_state(config, mesh), create)
        batches = PairBatches(pairs, length, tokenizer.pad, config.seed)
        if progress.data is not None:
            batches.restore(progress.data)
        log = open_log(config, workdir, progress, resources, wandb, REWARD_MODEL_KEYS)
        claim_run(workdir, config, posttraining, template)
        say("\n".join(_lines(config, mesh, state["params"], pairs, progress)))
        program, bar = score_program(config, objective, mesh), open_bar(config, progress, resources)
        sizes = config.training.micro_batch_size, length
        trainer = Trainer(
            config=config,
            mesh=mesh,
            train_step=jit_train_step(config, objective, mesh),
            state=state,
            progress=progress,
            batches=batches,
            evaluators=[functools.partial(_evaluate, program, sizes, tokenizer.pad, mesh, pairs, bar)],
            checkpoints=checkpoints,
            tokenizer_files=read_tokenizer(workdir),
            log=log,
            bar=bar,
            row=_update_row,
        )
        interrupted_by = trainer.run()
        return Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, tokenizer, interrupted_by)


def _evaluate(program, sizes, pad: int, mesh, pairs: Pairs, bar: ProgressBar, weights: Weights) -> Row:
    row = heldout_row(lambda ids: score_answers(program, weights, ids, sizes, pad, mesh), pairs)
    bar.note(f"{row['eval/pair_accuracy']:.1%} of {row['eval/pairs']} held-out pairs right")
    return row


def _update_row(step: int, metrics: dict[str, Any], rates: Rates) -> Row:
    return {f"reward_model/{name}": metrics[name] for name in UPDATE} | update_row(metrics, rates)


def _lines(config: Config, mesh, params, pairs: Pairs, progress) -> list[str]:
    rows = [
        ("model", model_line(config, params)),
        ("pairs", f"{len(pairs.train):,} to train on, {len(pairs.heldout):,} held out"),
        ("length", length_line(config)),
        ("rates", rates_line(config)),
        ("devices", devices_line(mesh)),
    ]
    return [f"{config.name}:", *(f"  {name:<10}{text}" for name, text in rows), position_line(config, progress)]
