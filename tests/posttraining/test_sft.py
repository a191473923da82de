"""Fine-tuning: packing changes no loss, MTP modes, and whole runs that freeze biases, stop, continue and export."""

import dataclasses
import datetime
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.examples import Example
from deepseek_jax.data.packing import next_token_batch, pack
from deepseek_jax.model.balance import RouterStats
from deepseek_jax.model.transformer import init
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.beginning import claim_run, tokenizer_and_template
from deepseek_jax.posttraining.chats import Chats, HeldOutChats
from deepseek_jax.posttraining.conversations import PLAIN, encode_conversation, find_template
from deepseek_jax.posttraining.settings import read
from deepseek_jax.posttraining.sft import heldout_row, sft_objective, train_sft, with_length
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.objective import Normalisers, Terms
from deepseek_jax.training.state import create_state
from deepseek_jax.training.step import gradients, jit_eval_step, recipe_of
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import claim_workdir, read_config, read_tokenizer
from tests.support import small
from tests.training import nano

TOKENIZER = byte_tokenizer()
COPIES = 2000


def settings(chats="chats.jsonl", initial="W", **training):
    """The nano model's fine-tuning."""
    tree = nano.get_config(str(chats))
    tree.update({"name": "nano_sft"})
    tree.loss.sequence_balance_weight = 0.0
    tree.optimizer.update({"weight_decay": 0.0, "bias_update_rate": (("constant", 1.0, 0.0),)})
    tree.data.update({"mask_documents": True, "reset_positions": True, "text_field": "messages"})
    tree.data.update({"sequence_length": 64})
    tree.training.update({"num_tokens": 1e12, "eval_every": 0, "checkpoint_every": 2, "keep_checkpoints": 9})
    tree.training.update({"initial_weights": str(initial)} | training)
    tree.posttraining = {"stage": "sft", "sft": {"template": "plain", "epochs": 2.0, "mtp": "detached"}}
    return tree


def one_device(config):
    return make_mesh(config.mesh, jax.devices()[:1])


def chat(number, answer):
    messages = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


@pytest.fixture(scope="module")
def evaluation():
    """(config, weights, evaluate): the held-out row of examples, in batches of eight rows."""
    tree = settings()
    tree.data.sequence_length = 256
    config, posttraining = read(tree)
    mesh = one_device(config)
    with jax.set_mesh(mesh):
        weights = jax.jit(functools.partial(init, config.model))(jax.random.key(0))
        compiled = {}

        def eval_step(weights, batch):
            if not compiled:
                step = jit_eval_step(config, sft_objective(config, posttraining.sft), mesh)
                compiled[0] = step.lower(weights, batch).compile()
            return compiled[0](weights, batch)

        def evaluate(examples, **data):
            changed = config.with_(data=data).data
            held_out = HeldOutChats(changed, TOKENIZER.pad, examples, 8, 10**6)
            return heldout_row(eval_step, held_out, mesh, weights)

        yield evaluate


def test_two_thousand_packed_copies_have_the_loss_of_one_alone(evaluation):
    """Bridge #2952: packed copies that saw each other had a loss of 0.03 instead of 0.57."""
    (copy,) = encode_conversation(PLAIN, TOKENIZER, chat(1, "an")["messages"])
    assert len(copy.ids) * 9 <= 257  # nine in a row
    alone, packed = evaluation([copy]), evaluation([copy] * COPIES)
    assert packed["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-6)
    assert packed["eval/mtp_loss"] == pytest.approx(alone["eval/mtp_loss"], rel=1e-6)
    # seen by a mask or positions that do not isolate, it is another loss
    assert abs(evaluation([copy] * 64, mask_documents=False)["eval/loss"] - alone["eval/loss"]) > 1e-4


def test_conversations_of_all_lengths_have_packed_the_losses_that_they_have_alone(evaluation):
    rng = np.random.default_rng(0)
    examples = [
        encode_conversation(PLAIN, TOKENIZER, chat(i, "x" * int(rng.integers(1, 9)))["messages"])[0] for i in range(20)
    ]
    weights = [int(example.weights.sum()) for example in examples]
    alone = [evaluation([example])["eval/loss"] for example in examples]
    assert len(set(weights)) > 3
    assert evaluation(examples)["eval/loss"] == pytest.approx(np.average(alone, weights=weights), rel=1e-6)


@functools.cache
def gradient_program(mtp):
    """(weights, gradients of a batch at an MTP weight) of one MoE and one MTP layer, in two micro-batches."""
    tree = settings(micro_batch_size=4)
    tree.model.update({"num_layers": 1, "num_dense_layers": 0})
    tree.posttraining.sft.mtp = mtp
    config, posttraining = read(tree)
    mesh = one_device(config)
    recipe = recipe_of(config, sft_objective(config, posttraining.sft), mesh)
    with jax.set_mesh(mesh):
        weights = jax.jit(functools.partial(init, config.model))(jax.random.key(0))
        arguments = weights, small.put(packed_batch(config)), small.RATES
        program = jax.jit(functools.partial(gradients, recipe)).lower(*arguments).compile()

    def run(order, mtp_weight):
        arrays = {name: array[order] for name, array in packed_batch(config).items()}
        with jax.set_mesh(mesh):
            grads, sums, norms = program(
                weights, small.put(arrays), small.RATES._replace(mtp_weight=np.float32(mtp_weight))
            )
        return jax.device_get(grads), jax.device_get(sums.terms), float(norms.weight)

    return run


def packed_batch(config):
    """Eight rows; in the first four one token is learned, in the others fifty."""
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(0, 256, 60), np.arange(60) >= (59 if i < 4 else 10)) for i in range(8)]
    return next_token_batch(pack(examples, 65, 0), config.data)


def assert_close(some, others):
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * np.abs(a).max())


@pytest.mark.slow
def test_detached_mtp_layers_alone_learn_from_their_loss():
    """The main model's gradient is that without their loss; theirs is that of joint training."""
    rows = np.arange(8)
    joint, detached = (gradient_program(mtp)(rows, 0.3) for mtp in ("joint", "detached"))
    main = gradient_program("joint")(rows, 0.0)
    layers = [grads.pop("mtp_layers") for grads, _, _ in (joint, detached, main)]
    assert joint[1].mtp == detached[1].mtp > 0
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(layers[1])) > 1e-4
    assert_close(layers[0], layers[1])
    assert_close(main[0], detached[0])
    assert np.abs(joint[0]["embed_VD"] - main[0]["embed_VD"]).max() > 1e-4


@pytest.mark.slow
def test_a_learned_token_weighs_the_same_in_every_micro_batch():
    """Micro-batches of 4 and 200 learned tokens; any order of the rows gives the same gradients.

    Of devices tests.training.test_equal_steps shows it, with weights that differ as much.
    """
    run = gradient_program("detached")
    grads, terms, weight = run(np.arange(8), 0.3)
    assert weight == 204
    for order in ([0, 4, 1, 5, 2, 6, 3, 7], [7, 6, 5, 4, 3, 2, 1, 0]):
        other, others, same = run(np.array(order), 0.3)
        assert same == weight and others.loss == pytest.approx(terms.loss, rel=1e-6)
        assert_close(grads, other)


def test_mtp_layers_that_are_off_do_not_run_and_add_nothing():
    tree = settings()
    tree.posttraining.sft.mtp = "off"
    config, posttraining = read(tree)
    objective = sft_objective(config, posttraining.sft)
    assert objective.next_tokens({"targets_BS": np.zeros((1, 4))}) is None
    router = RouterStats(*[np.zeros(1)] * len(RouterStats._fields))
    terms, norms = Terms(np.float32(6.0), np.float32(0.0), np.zeros(0, np.float32)), Normalisers(3.0, 4, 1)
    assert objective.total(terms, router, norms, small.RATES) == 2.0


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """(a folder with a pre-trained run whose biases have moved, and chats; a complete fine-tuning of it)."""
    folder = tmp_path_factory.mktemp("sft")
    tree = settings()
    del tree["posttraining"]
    tree.training.initial_weights = ""
    save_run(from_config_dict(tree), folder / "base")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat(i, f"{i}!")) + "\n" for i in range(100)))
    config, posttraining = read(settings(folder / "chats.jsonl", folder / "base"))
    result = train_sft(config, posttraining, folder / "sft", one_device(config))
    return folder, result


def save_run(config, workdir):
    """Leave what a pre-training leaves: a checkpoint whose biases have moved, the tokenizer, the configuration."""
    mesh, generator = one_device(config), np.random.default_rng(0)
    workdir.mkdir()
    TOKENIZER.save(workdir / "tokenizer.json")
    with jax.set_mesh(mesh):
        state = create_state(config)
        state["router_bias"] = jax.tree.map(
            lambda leaf: jax.device_put(np.float32(generator.normal(size=leaf.shape)), leaf.sharding),
            state["router_bias"],
        )
        checkpoints = Checkpoints(workdir, keep=1)
        checkpoints.save(state, Progress(step=1, tokens_seen=512, data=None), config, read_tokenizer(workdir), mesh)
        checkpoints.wait()
        checkpoints.close()
    claim_workdir(workdir, config)


def run(folder, workdir, **changes):
    tree = settings(folder / "chats.jsonl", folder / "base")
    for path, value in changes.items():
        section, key = path.split("__")
        tree[section][key] = value
    config, posttraining = read(tree)
    return train_sft(config, posttraining, folder / workdir, one_device(config))


def final(result):
    return jax.device_get({name: result.state[name] for name in ("params", "router_bias", "optimizer")})


@pytest.mark.slow
def test_a_run_learns_replies_with_frozen_biases_and_is_an_ordinary_workdir(workdirs):
    folder, result = workdirs
    rows = [row for row in read_rows(folder / "sft") if "eval/loss" in row]
    assert rows[0]["step"] == 0 and rows[-1]["step"] == result.step and rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert "eval/bits_per_byte" not in rows[0]
    config = read_config(folder / "sft")
    assert result.step == -(-config.training.num_tokens // (8 * 64)) and config.name == "nano_sft"
    assert json.loads((folder / "sft" / "posttraining.json").read_text())["sft"]["template"] == "plain"
    assert find_template("folder", folder / "sft" / "huggingface").source == PLAIN.source
    before = jax.device_get(train_base_bias(folder))
    after = jax.device_get(result.state["router_bias"])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(before))
    assert [leaf.tobytes() for leaf in jax.tree.leaves(before)] == [leaf.tobytes() for leaf in jax.tree.leaves(after)]
    moved = run(
        folder, "moved", optimizer__bias_update_rate=(("constant", 1.0, 1e-3),), training__num_tokens=2 * 8 * 64
    )
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, moved.state["router_bias"])), strict=True))


def train_base_bias(folder):
    config = read_config(folder / "base")
    with jax.set_mesh(mesh := one_device(config)):
        return restore_weights(config, folder / "base", mesh)[0].router_bias


@pytest.mark.slow
def test_a_run_that_was_killed_continues_to_the_same_bits_and_refuses_others(workdirs):
    folder, result = workdirs
    shutil.copytree(folder / "sft", folder / "killed")
    checkpoints = folder / "killed" / "checkpoints"
    for path in checkpoints.iterdir():
        if path.name.isdecimal() and int(path.name) > 2:
            shutil.rmtree(path)
    shutil.rmtree(folder / "killed" / "tensorboard")
    (folder / "base").rename(folder / "moved_away")  # a run with checkpoints reads it no more
    try:
        with pytest.raises(ValueError, match="posttraining.sft.mtp: 'detached' in the workdir, 'off' given"):
            tree = settings(folder / "chats.jsonl", folder / "base")
            tree.posttraining.sft.mtp = "off"
            train_sft(*read(tree), folder / "killed")
        again = run(folder, "killed")
    finally:
        (folder / "moved_away").rename(folder / "base")
    jax.tree.map(np.testing.assert_array_equal, final(result), final(again))
    lines = [[row for row in read_rows(folder / name) if "train/loss" in row] for name in ("sft", "killed")]
    assert [row["train/loss"] for row in lines[0]] == [row["train/loss"] for row in lines[1]]
    with (folder / "chats.jsonl").open("a") as file:
        file.write(json.dumps(chat(7, "another")) + "\n")
    with pytest.raises(ValueError, match="training.num_tokens|another data stream"):
        run(folder, "killed")


@pytest.mark.slow
def test_nothing_is_left_of_a_start_that_fails(workdirs):
    folder, _ = workdirs
    (folder / "broken.jsonl").write_text('{"messages": [')
    with pytest.raises(ValueError, match="broken.jsonl line 1 is not JSON"):
        run(folder, "never", data__sources=({"path": str(folder / "broken.jsonl")},))
    assert not (folder / "never").exists()
    with pytest.raises(ValueError, match="holds a run without post-training; choose another --workdir"):
        run(folder, "base")


class Clock(datetime.datetime):
    """A clock that a test sets."""

    day = datetime.datetime(2026, 1, 30, 23, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.day


def test_a_template_writes_the_date_of_the_runs_first_start(tmp_path, monkeypatch):
    """Else the ids of the next day would be those of another run."""
    for module in ("deepseek_jax.data.chat", "deepseek_jax.posttraining.beginning"):
        monkeypatch.setattr(f"{module}.datetime", SimpleNamespace(datetime=Clock), raising=False)
    tree = settings(initial=tmp_path / "base")
    config, posttraining = read(tree)
    (tmp_path / "base").mkdir()
    TOKENIZER.save(tmp_path / "base" / "tokenizer.json")
    claim_workdir(tmp_path / "base", config)
    name = str(tmp_path / "dated.jinja")
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %B %Y, %H:%M') }}" + PLAIN.source)

    def written(workdir):
        workdir.mkdir(exist_ok=True)
        tokenizer, template = tokenizer_and_template(config, name, workdir)
        claim_run(workdir, config, posttraining, template)
        examples = encode_conversation(template, tokenizer, chat(1, "a")["messages"])
        return tokenizer.decode(examples[0].ids.tolist())

    first = written(tmp_path / "run")
    assert first.startswith("30 January 2026, 23:59User")
    monkeypatch.setattr(Clock, "day", datetime.datetime(2026, 1, 31))
    assert written(tmp_path / "run") == first
    assert written(tmp_path / "other").startswith("31 January 2026, 00:00User")
    assert not (tmp_path / "base" / "template_date.txt").exists()
    (tmp_path / "run" / "template_date.txt").write_text("yesterday")
    with pytest.raises(ValueError, match="template_date.txt holds 'yesterday' and no date; write the day"):
        written(tmp_path / "run")


def test_epochs_of_less_than_a_row_are_refused():
    config, posttraining = read(settings())
    chats = Chats([Example(np.zeros(9, np.int32), np.ones(9, bool))], [], 1, 0)
    length = config.data.sequence_length
    assert with_length(config, posttraining.sft, chats).training.num_tokens == posttraining.sft.epochs * length
    less = dataclasses.replace(posttraining.sft, epochs=0.4)
    with pytest.raises(ValueError, match="epochs = 0.4 of 1 packed row is less than a row; give 1 or more"):
        with_length(config, less, chats)
