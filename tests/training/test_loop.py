"""The loop: order of files and steps, interruption, skipped steps, and a sheet and a table from the metrics alone.

All but the last test train a table of numbers that remembers every token it has seen, in order: a lost, repeated or
reordered batch, a wrong rate or a stale array changes its bits. Data, checkpoints and metrics are the real ones.
"""

import contextlib
import functools
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import NamedSharding

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.heldout import open_held_out
from deepseek_jax.data.pipeline import make_train_loader, open_corpus, open_tokenizer
from deepseek_jax.evaluation.workdir import evaluate_workdir
from deepseek_jax.evaluation.yardsticks import add_yardsticks
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training import loop, pretrain
from deepseek_jax.training.checkpoint import Checkpoints, Progress, SaveError
from deepseek_jax.training.curves import final_table
from deepseek_jax.training.loop import NonFiniteError
from deepseek_jax.training.metrics import KEYS, read_rows
from deepseek_jax.training.sheet import draw_sheet
from deepseek_jax.training.workdir import check_workdir, claim_workdir, occupied, read_config, read_tokenizer
from tests.training.nano import get_config

NUM_STEPS = 60
LAYERS, EXPERTS = 2, 8


def fake_step(state, batch, rates):
    """Fold batch and rates into the state in an order-dependent way; skip non-finite batches as the real step does."""
    finite = jnp.isfinite(batch["loss_weights_BS"]).all()
    text = (
        (batch["tokens_BS"] * (1 + jnp.arange(batch["tokens_BS"].shape[1], dtype=jnp.int32)))
        .sum(dtype=jnp.int32)
        .astype(jnp.float32)
    )
    table = state["params"]["table"] * 0.75 + text * rates.learning_rate
    table = jnp.where(finite, table, state["params"]["table"])
    skipped = jnp.where(finite, 0, state["skipped"] + 1)
    new = state | {"params": {"table": table}, "step": state["step"] + 1, "skipped": skipped}
    return new, {
        "loss": jnp.where(finite, table.mean(), jnp.nan),
        "mtp_loss": table[:1],
        "nonfinite": jnp.where(finite, 0, 1),
        "skipped": skipped,
        "counts_LE": jnp.arange(LAYERS * EXPERTS, dtype=jnp.int32).reshape(LAYERS, EXPERTS),
        "dead_experts": jnp.int32(1),
        "tokens": (batch["loss_weights_BS"] > 0).sum(dtype=jnp.int32),
        **dict.fromkeys(("balance_loss", "z_loss", "grad_norm", "update_norm", "param_norm"), jnp.float32(0)),
        **dict.fromkeys(("max_vio_L", "max_vio_sequence_L", "bias_min_L", "bias_max_L"), jnp.zeros(LAYERS)),
    }


def fake_eval_step(weights, batch):
    weight = batch["loss_weights_BS"].sum()
    counts_LE = jnp.ones((LAYERS, EXPERTS), jnp.int32)
    return {
        "loss_sum": weight * 2 + weights.params["table"][0] * 0,
        "weight_sum": weight,
        "mtp_loss_sum": weight[None],
        "counts_LE": counts_LE,
    }


def fake_state(mesh) -> dict:
    def put(value):
        return jax.device_put(value, NamedSharding(mesh, jax.P()))

    counters = {"step": put(np.int32(0)), "skipped": put(np.int32(0))}
    return {"params": {"table": put(np.ones(4, np.float32))}, "router_bias": {}, "optimizer": ()} | counters


def fake_abstract_state(config, mesh) -> dict:
    with jax.set_mesh(mesh):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fake_state(mesh))


class Watched:
    """A part of a run that calls `watch` with what a method is given, before the method."""

    def __init__(self, part, **watches):
        self.part, self.watches = part, watches

    def __getattr__(self, name):
        method = getattr(self.part, name)
        if name not in self.watches:
            return method

        def watched(*arguments):
            self.watches[name](*arguments)
            return method(*arguments)

        return watched


def train(config, workdir, on_show=lambda *_: None, on_batch=lambda batch: batch, log=None) -> pretrain.Result:
    """Build the parts around the table and run them; `on_show` sees what the bar shows, `on_batch` changes batches."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as resources:
        resources.enter_context(occupied(workdir))
        check_workdir(workdir, config)
        checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
        resources.callback(checkpoints.close)
        abstract = fake_abstract_state(config, mesh)

        def create():
            return fake_state(mesh), Progress(step=0, tokens_seen=0, data=None)

        state, progress = pretrain.begin(checkpoints, config, workdir, mesh, abstract, create)
        tokenizer = open_tokenizer(config, workdir)
        loader = make_train_loader(config, tokenizer, workdir)
        resources.callback(loader.close)
        held_out, evaluate = open_held_out(config, tokenizer, workdir), jax.jit(fake_eval_step)
        claim_workdir(workdir, config)
        trainer = loop.Trainer(
            config=config,
            mesh=mesh,
            train_step=jax.jit(fake_step, donate_argnums=0),
            state=state,
            progress=progress,
            batches=Changed(loader, on_batch),
            evaluators=[functools.partial(pretrain.held_out_row, evaluate, held_out, mesh)],
            checkpoints=checkpoints,
            tokenizer_files=read_tokenizer(workdir),
            log=log or pretrain.open_log(config, workdir, progress, resources),
            bar=Watched(pretrain.open_bar(config, progress, resources), show=on_show),
        )
        interrupted_by = trainer.run()
        return pretrain.Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, tokenizer, interrupted_by)


class Changed:
    """A loader whose batches are changed on their way."""

    def __init__(self, loader, change):
        self.state, self.restore = loader.state, loader.restore
        self.next_batch = lambda batch_size: change(loader.next_batch(batch_size))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(generator.choice(list("abcdefgh \n"), size=1500)))
    return folder


@pytest.fixture
def config(corpus) -> Config:
    return from_config_dict(get_config(str(corpus)))


def change(config: Config, section: str, **values) -> Config:
    return config.with_(**{section: values})


def lines(workdir: Path) -> list[dict]:
    """The metrics without what is time."""
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in read_rows(workdir)]


def checkpoint_steps(workdir: Path) -> list[int]:
    checkpoints = Checkpoints(workdir, keep=None)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def at_step(step: int, action):
    """For `on_show`: call `action` while the metrics of `step` are shown."""

    def watch(tokens_seen, shown, loss):
        if shown == step:
            action()

    return watch


def interrupt_at(step: int, number: signal.Signals):
    return at_step(step, lambda: os.kill(os.getpid(), number))


def poisoned(numbers):
    """For `on_batch`: make the weights of some batches, by their number from 1, NaN."""
    count = iter(range(1, 10**6))

    def change(batch):
        if next(count) in numbers:
            batch["loss_weights_BS"] = batch["loss_weights_BS"] * np.float32(np.nan)
        return batch

    return change


def test_a_run_leaves_lines_evaluations_and_checkpoints(config, tmp_path):
    result = train(config, tmp_path)
    assert result.interrupted_by is None and result.step == NUM_STEPS and result.tokens_seen == NUM_STEPS * 8 * 32
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 20, 40, 60]
    assert [row["tokens_seen"] for row in rows] == [row["step"] * 8 * 32 for row in rows]
    assert checkpoint_steps(tmp_path) == [55, 60]
    assert [row["step"] for row in rows if "speed/compile_seconds" in row] == [1]
    bits = rows[0]["eval/bits_per_byte"]
    assert bits == pytest.approx(2 / np.log(2), rel=0.01)  # two nats per target, bytes and a few ends of documents


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_continues_exactly(config, tmp_path, number, capsys):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    handler = signal.getsignal(signal.SIGINT)
    expected = jax.device_get(train(config, whole).state)
    result = train(config, interrupted, on_show=interrupt_at(17, number))
    assert result.interrupted_by == number
    assert result.step == 18  # 18 was on the device when the metrics of 17 were shown
    assert checkpoint_steps(interrupted)[-1] == 18
    assert "finishing the step and saving" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    final = jax.device_get(train(config, interrupted).state)
    assert jax.tree.all(jax.tree.map(np.array_equal, final, expected))
    assert lines(interrupted) == lines(whole)


def test_continuing_replays_what_came_after_the_last_checkpoint(config, tmp_path):
    """The process dies without a word in step 13; the checkpoint is of step 10."""
    whole, died = tmp_path / "whole", tmp_path / "died"
    expected = jax.device_get(train(config, whole).state)

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, died, on_show=at_step(13, die))
    assert checkpoint_steps(died) == [5, 10] and read_rows(died)[-1]["step"] == 12
    final = jax.device_get(train(config, died).state)
    assert jax.tree.all(jax.tree.map(np.array_equal, final, expected))
    assert lines(died) == lines(whole)


def test_another_mesh_continues_with_the_same_rows(config, tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    expected = jax.device_get(train(config, whole).state)
    train(config, moved, on_show=interrupt_at(20, signal.SIGTERM))
    final = jax.device_get(train(change(config, "mesh", expert=4), moved).state)
    assert jax.tree.all(jax.tree.map(np.array_equal, final, expected))


def test_a_longer_run_equals_one_that_was_long_from_the_start(config, tmp_path, caplog):
    """With schedules that do not change: those that do stretch, which is said."""
    logging.get_absl_logger().addHandler(caplog.handler)
    constant = (("constant", 1.0, 1e-3),)
    config = change(config, "optimizer", learning_rate=constant, bias_update_rate=constant)
    config = config.with_(loss={"mtp_weight": constant})
    short = change(config, "training", num_tokens=18.0 * 8 * 32)
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    expected = jax.device_get(train(config, whole).state)
    assert train(short, grown).step == 18
    final = jax.device_get(train(config, grown).state)
    assert jax.tree.all(jax.tree.map(np.array_equal, final, expected))
    assert [row for row in lines(grown) if not (row["step"] == 18 and "eval/loss" in row)] == lines(whole)
    assert read_config(grown) == config
    assert "at token 4,608 optimizer.learning_rate stays 0.001" in caplog.text
    before = (grown / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="less than the 15,360 tokens that the run has seen"):
        train(short, grown)
    assert (grown / "metrics.jsonl").read_bytes() == before and read_config(grown) == config
    logging.get_absl_logger().removeHandler(caplog.handler)


def test_a_complete_run_is_not_touched(config, tmp_path):
    first = train(config, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = train(config, tmp_path)
    assert again.step == first.step and again.interrupted_by is None
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_too_many_nonfinite_steps_stop_the_run(config, tmp_path):
    config = change(config, "training", max_skipped_steps=8)
    with pytest.raises(NonFiniteError, match="(?s)step 20: .*8 times in a row.*step 10"):
        train(config, tmp_path, on_batch=poisoned(range(13, 100)))
    assert checkpoint_steps(tmp_path) == [5, 10]  # the saves of 15 and 20 fell into the bad steps
    rows = [row for row in read_rows(tmp_path) if "train/loss" in row]
    assert [row["optimizer/skipped"] for row in rows] == [0] * 12 + list(range(1, 9))
    assert rows[-1]["train/loss"] is None
    assert train(config, tmp_path).step == NUM_STEPS


def test_a_few_nonfinite_steps_do_not_stop_it(config, tmp_path):
    assert train(config, tmp_path, on_batch=poisoned(range(5, 9))).step == NUM_STEPS


def test_a_failed_save_stops_the_run_and_names_the_intact_one(config, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))

    try:  # without a log, which would fail first, with an error of its own
        with pytest.raises(SaveError, match="File too large\nthe checkpoint of step (5|10) is intact") as caught:
            train(config, tmp_path, on_show=at_step(13, fill_the_disk), log=NoLog())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"step {checkpoint_steps(tmp_path)[-1]} is intact" in str(caught.value)


class NoLog:
    def write(self, row):
        """Write nothing."""

    def flush(self):
        """Write nothing."""


def test_another_config_is_refused_before_anything_is_read(config, tmp_path):
    train(config, tmp_path)
    with pytest.raises(ValueError, match="optimizer.b1: 0.9 in the workdir, 0.8 given"):
        pretrain.train(change(config, "optimizer", b1=0.8), tmp_path)


def test_a_config_that_cannot_work_does_not_own_the_workdir(config, tmp_path):
    with pytest.raises(ValueError, match="mesh"):
        pretrain.train(change(config, "mesh", expert=3), tmp_path)
    assert not (tmp_path / "config.json").exists()
    train(config, tmp_path)
    assert read_config(tmp_path) == config


def test_the_batch_ramp_follows_the_tokens(config, tmp_path):
    config = change(config, "training", batch_size=(("constant", 0.5, 8.0), ("constant", 1.0, 16.0)), log_every=10)
    train(config, tmp_path)
    rows = [row for row in read_rows(tmp_path) if "train/loss" in row]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]  # 30 steps of 8 sequences, 15 of 16
    assert [row["tokens_seen"] for row in rows] == [32 * n for n in (80, 160, 240, 400)]
    assert checkpoint_steps(tmp_path)[-1] == 45


def test_the_report_is_drawn_from_the_metrics_alone(config, tmp_path):
    result = train(config, tmp_path)
    first = add_yardsticks(config, tmp_path, result.tokenizer, result.step, result.tokens_seen)
    assert (
        add_yardsticks(config, tmp_path, result.tokenizer, result.step, result.tokens_seen)
        == {"step": 60, "tokens_seen": 15360} | first
    )
    digest = open_corpus(config, result.tokenizer, tmp_path).digest
    table = final_table(tmp_path, digest, checkpoint_steps(tmp_path))
    for expected in (
        "before",
        "bigram",
        "gzip -9 of pieces",
        "gzip -9 of each document",
        "xz -9",
        "tokens/s",
        "compile time",
        digest[:16],
        "55, 60",
    ):
        assert expected in table
    path = draw_sheet(config, tmp_path, 10_200_000)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


@pytest.mark.slow
def test_the_real_model_writes_every_documented_key_and_is_evaluated_from_its_workdir(config, tmp_path):
    config = change(config, "training", num_tokens=3.0 * 8 * 32)
    mesh = make_mesh(config.with_(mesh={"data": 1}).mesh, jax.devices()[:1])
    result = pretrain.train(config, tmp_path, mesh)
    written = set().union(*(row.keys() for row in read_rows(tmp_path)))
    assert written == {key for key in KEYS if not key.startswith("yardstick/")} - {
        "speed/mfu",
        "eval/source_bits_per_byte",
    }
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(result.state["params"])))
    assert int(result.state["step"]) == 3
    again, progress = evaluate_workdir(read_config(tmp_path), tmp_path, mesh=mesh)
    assert progress.step == 3
    assert again.bits_per_byte == read_rows(tmp_path)[-1]["eval/bits_per_byte"]
