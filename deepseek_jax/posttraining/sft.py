"""Supervised fine-tuning: `training.pretrain` with conversations for text, around the same `Trainer`.

    conversations -> examples with weights -> packed rows -> the step of pre-training -> the same checkpoints

Only replies and their end tokens have weight (`posttraining.conversations`). Conversations packed into one row do not
see each other: attention stays inside of a segment and positions begin at 0, so a packed conversation has the loss it
has alone. The loss is divided by the number of learned tokens of the whole batch: over all micro-batches and devices,
never by a local count.

The router biases stay where pre-training left them while `optimizer.bias_update_rate` is 0, as in the configurations
of this stage: conversations are few and narrow, and a bias that follows their loads changes what every other text is
routed to.

The run's length is `epochs` passes over the packed rows, known when the conversations are packed. So the workdir's
config.json has that number as `training.num_tokens`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import make_loader
from deepseek_jax.huggingface.load import abstract_weights
from deepseek_jax.parallel.context import readers
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.beginning import claim_run, tokenizer_and_template
from deepseek_jax.posttraining.chats import Chats, HeldOutChats, read_chats, rows_per_epoch
from deepseek_jax.posttraining.settings import Posttraining, Sft, check_claimed
from deepseek_jax.training.adapted import adapters_line
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.continuation import check_one_step
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.journal import say
from deepseek_jax.training.loop import Row, Trainer
from deepseek_jax.training.objective import Pretraining, pretraining
from deepseek_jax.training.pretrain import Result, begin, open_bar, open_log
from deepseek_jax.training.step import jit_eval_step
from deepseek_jax.training.summary import (
    devices_line,
    length_line,
    model_line,
    position_line,
    programs_line,
    rates_line,
    short,
)
from deepseek_jax.training.trainable import open_parts
from deepseek_jax.training.workdir import check_workdir, occupied, read_tokenizer


def train_sft(
    config: Config, posttraining: Posttraining, workdir: Path, mesh: jax.sharding.Mesh | None = None, wandb: str = ""
) -> Result:
    """Fine-tune on conversations in `workdir`, from its newest intact checkpoint or from `training.initial_weights`.

    Args:
        config: as `settings.read` returns it.
        posttraining: with the settings of this stage.
        workdir: the run's folder; made if it does not exist.
        mesh: to train on; by default that of `config`, over all devices.
        wandb: a project of Weights & Biases to show the metrics in, too; none if "".

    Raises:
        ValueError: bad input, `workdir` belongs to another run, or another process trains there.
        NonFiniteError, SaveError, OSError: as `training.pretrain.train`.
    """
    sft = posttraining.sft
    assert sft is not None
    with contextlib.ExitStack() as resources:
        resources.enter_context(occupied(workdir))
        check_claimed(workdir, posttraining)
        tokenizer, template = tokenizer_and_template(config, sft.template, workdir)
        chats = read_chats(config.data, template, tokenizer)
        config = with_length(config, sft, chats)
        check_workdir(workdir, config)
        check_one_step(config)
        mesh = mesh or make_mesh(config.mesh)
        processes = readers(mesh)
        resources.enter_context(jax.set_mesh(mesh))
        parts = open_parts(config, posttraining.lora, objective := sft_objective(config, sft), workdir, mesh)
        evaluate = parts.on_whole(jit_eval_step(config, objective, mesh))
        checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
        resources.callback(checkpoints.close)
        state, progress = begin(checkpoints, config, workdir, mesh, parts.abstract, parts.create)
        loader = make_loader(config, tokenizer, chats.train, *processes)
        resources.callback(loader.close)
        if progress.data is not None:
            loader.restore(progress.data)  # refuses other conversations, or another template
        log = open_log(config, workdir, progress, resources, wandb)
        claim_run(workdir, config, posttraining, template, parts.base)
        say("\n".join(_lines(config, posttraining, mesh, state["params"], chats, progress)))
        trainer = Trainer(
            config=config,
            mesh=mesh,
            train_step=parts.train_step,
            state=state,
            progress=progress,
            batches=loader,
            evaluators=_evaluators(config, tokenizer, chats, evaluate, mesh, processes),
            checkpoints=checkpoints,
            tokenizer_files=read_tokenizer(workdir),
            log=log,
            bar=open_bar(config, progress, resources),
            adapters=parts.weights_met,
        )
        interrupted_by = trainer.run()
        return Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, tokenizer, interrupted_by)


def with_length(config: Config, sft: Sft, chats: Chats) -> Config:
    """Return the configuration with the number of tokens of `epochs`, padding included, if that is fewer.

    Raises:
        ValueError: all conversations are held out, or the epochs are less than a row.
    """
    if not chats.train:
        raise ValueError(
            f"all {chats.num_conversations} conversations are held out; lower data.heldout_fraction, or add others"
        )
    rows = rows_per_epoch(chats.train, config.data.sequence_length)
    num_tokens = round(sft.epochs * rows) * config.data.sequence_length
    if not num_tokens:
        raise ValueError(
            f"config.posttraining.sft.epochs = {sft.epochs:g} of {rows} packed row{'s' * (rows > 1)} is less than a"
            f" row; give {1 / rows:.2g} or more"
        )
    return config.with_(training={"num_tokens": float(min(num_tokens, config.training.num_tokens))})


def sft_objective(config: Config, sft: Sft) -> Pretraining:
    """Return pre-training's objective; what carries loss is in the batch."""
    return dataclasses.replace(pretraining(config), mtp=sft.mtp)


def heldout_row(eval_step: Callable, held_out: HeldOutChats, mesh: jax.sharding.Mesh, weights: Weights) -> Row:
    """Evaluate on held-out conversations; return losses in nats per learned token, and MaxVio of each layer."""
    pending = [eval_step(weights, place_batch(batch, mesh)) for batch in held_out]
    sums = jax.tree.map(lambda *values: np.sum(np.stack(values).astype(np.float64), axis=0), *jax.device_get(pending))
    loss, counts_LE = float(sums["loss_sum"] / sums["weight_sum"]), sums["counts_LE"]
    return {
        "eval/loss": loss,
        "eval/perplexity": float(np.exp(min(loss, 700.0))),  # e^709 is the largest double
        "eval/mtp_loss": (sums["mtp_loss_sum"] / sums["weight_sum"]).tolist(),
        "eval/max_vio": counts_LE.max(axis=1) / np.maximum(counts_LE.mean(axis=1), 1e-9) - 1.0,
    }


def _evaluators(config, tokenizer, chats, eval_step, mesh, processes) -> list[Callable[[Weights], Row]]:
    if not chats.heldout:
        return []
    sizes = config.training.micro_batch_size, config.training.eval_batches
    held_out = HeldOutChats(config.data, tokenizer.pad, chats.heldout, *sizes, *processes)
    return [functools.partial(heldout_row, eval_step, held_out, mesh)]


def _lines(config, posttraining: Posttraining, mesh, params, chats: Chats, progress: Progress) -> list[str]:
    """Return what the run is, for a person."""
    sft, lora = posttraining.sft, posttraining.lora
    assert sft is not None
    model = abstract_weights(config, mesh).params if lora else params
    learned, total = (sum(f(example) for example in chats.train) for f in (_num_learned, _num_tokens))
    rows = [
        ("model", model_line(config, model)),
        *([("adapters", adapters_line(lora, params))] if lora else []),
        (
            "chats",
            f"{chats.num_conversations:,} conversations, {short(total)} tokens, {learned / total:.0%} of them learned;"
            f" {sft.epochs:g} epochs; held out {chats.num_heldout:,}",
        ),
        ("length", length_line(config)),
        ("rates", rates_line(config)),
        ("devices", devices_line(mesh)),
        ("programs", programs_line(config, mesh)),
    ]
    return [f"{config.name}:", *(f"  {name:<10}{text}" for name, text in rows), position_line(config, progress)]


def _num_learned(example) -> int:
    return int(example.weights.sum())


def _num_tokens(example) -> int:
    return len(example.ids)
