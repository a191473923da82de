"""A run that begins with another run: its weights alone, or its whole state."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer, train_bpe
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training import origin, pretrain
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.origin import find_origin, initial_state, read_origin
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import claim_workdir, read_tokenizer
from tests.training.nano import get_config
from tests.training.runs import write_corpus

# What one worker made or compiled, its other tests use.
pytestmark = [pytest.mark.xdist_group("origin"), pytest.mark.usefixtures("absl_to_caplog")]

CONFIG = from_config_dict(get_config("corpus"))
MESH = make_mesh(CONFIG.with_(mesh={"data": 1}).mesh, jax.devices()[:1])


def make_state(seed: int) -> dict:
    """A state of random numbers; nothing is compiled."""
    generator = np.random.default_rng(seed)

    def put(leaf):
        values = generator.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, NamedSharding(MESH, leaf.sharding.spec))

    return jax.tree.map(put, abstract_state(CONFIG, MESH))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("run")
    byte_tokenizer().save(workdir / "tokenizer.json")
    claim_workdir(workdir, CONFIG)
    with jax.set_mesh(MESH):
        checkpoints = Checkpoints(workdir, keep=2)
        for step in (1, 2):
            progress = Progress(step=step, tokens_seen=256 * step, data={"row": step})
            checkpoints.save(make_state(step), progress, CONFIG, read_tokenizer(workdir), MESH)
        checkpoints.close()
    return workdir


def beginning(text, **sections):
    return CONFIG.with_(**{"training": {"initial_weights": str(text)}} | sections)


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


@pytest.mark.parametrize(("at", "step"), [("", 2), ("@1", 1)])
def test_weights_alone(run, tmp_path, at, step):
    recipe = {"learning_rate": (("constant", 1.0, 1.0),), "b2": 0.5}
    with jax.set_mesh(MESH):
        state, progress = initial_state(beginning(f"{run}{at}", optimizer=recipe), tmp_path, MESH)
    there = make_state(step)
    assert equal(state["params"], there["params"]) and equal(state["router_bias"], there["router_bias"])
    assert progress == Progress(step=0, tokens_seen=0, data=None) and int(state["step"]) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state["optimizer"]))
    assert read_tokenizer(tmp_path) == read_tokenizer(run)


def test_the_whole_state_goes_on(run, tmp_path):
    config = beginning(f"state:{run}@1")
    with jax.set_mesh(MESH):
        state, progress = initial_state(config, tmp_path, MESH)
    assert equal(state, make_state(1))
    assert progress == Progress(step=1, tokens_seen=256, data={"row": 1})
    claim_workdir(tmp_path, config)  # evaluated before its first checkpoint
    weights, progress = restore_weights(config, tmp_path, MESH)
    assert progress.step == 1 and equal(weights.params, make_state(1)["params"])


def test_another_model_is_refused_with_each_difference(run, caplog):
    config = beginning(run, model={"vocab_size": 300, "expert_hidden": 32})
    with pytest.raises(ValueError, match="another model") as caught:
        read_origin(config, MESH)
    for line in ("model.vocab_size: 262 there, 300 in the config", "model.expert_hidden: 16 there, 32 in the config"):
        assert line in str(caught.value)
    read_origin(beginning(run, model={"rope_base": 5e5}), MESH)  # a longer context
    assert "model.rope_base: 10000.0 there, 500000.0 in the config" in caplog.text
    with pytest.raises(ValueError, match=r"no average of the weights; set optimizer\.ema_decay = 0"):
        read_origin(beginning(f"state:{run}", optimizer={"ema_decay": 0.9}), MESH)


def test_another_tokenizer_is_refused(run, tmp_path):
    train_bpe(["aa aa aa bb bb"], 262).save(tmp_path / "other.json")
    config = beginning(run, data={"tokenizer": str(tmp_path / "other.json")})
    with jax.set_mesh(MESH), pytest.raises(ValueError, match="another tokenizer than the one of these weights"):
        initial_state(config, tmp_path, MESH)


REFUSED = {
    "{run}@7": r"no checkpoint of step 7; it has \[1, 2\]",
    "{run}/gone": "does not exist",
    "state:{run}/huggingface": "is not the workdir of a run",
    "gs://bucket/run": "is an address",
    "{run}/bare": "holds no checkpoints; train there first",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_origin_is_refused(run, text):
    for name in ("huggingface", "bare"):
        (run / name).mkdir(exist_ok=True)
    claim_workdir(run / "bare", CONFIG)
    with pytest.raises(ValueError, match=REFUSED[text]):
        read_origin(beginning(text.format(run=run)), MESH)


def test_a_folder_with_an_at_in_its_name_is_that_folder(tmp_path):
    (tmp_path / "a@5").mkdir()
    assert find_origin(beginning(tmp_path / "a@5")) == origin.Origin(tmp_path / "a@5")
    assert find_origin(CONFIG) is None


@pytest.mark.slow
def test_a_run_that_begins_with_a_whole_state_equals_the_one_it_left(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    config = from_config_dict(get_config(str(corpus)))
    config = config.with_(training={"num_tokens": 6.0 * 8 * 32, "checkpoint_every": 3})
    whole = pretrain.train(config, tmp_path / "whole", MESH)
    fork = config.with_(training={"initial_weights": f"state:{tmp_path / 'whole'}@3"})
    result = pretrain.train(fork, tmp_path / "fork", MESH)
    assert result.step == 6 and equal(result.state, whole.state)
    losses = [
        {row["step"]: row["train/loss"] for row in read_rows(tmp_path / name) if "train/loss" in row}
        for name in ("whole", "fork")
    ]
    assert losses[1] == {step: losses[0][step] for step in (4, 5, 6)}
