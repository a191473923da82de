"""What a run says of itself before it compiles."""

import jax
import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.pipeline import open_corpus
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.optimizer import batch_size
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.summary import num_steps, position_line, rates_line, run_lines, short
from tests.training.nano import get_config


@pytest.fixture
def config(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 1000)
    return from_config_dict(get_config(str(tmp_path)))


def test_a_run_says_what_it_is(config, tmp_path):
    mesh = make_mesh(config.with_(mesh={"data": 4, "expert": 2}).mesh)
    params = abstract_state(config, mesh)["params"]
    corpus = open_corpus(config, byte_tokenizer(), tmp_path / "run")
    documents = [len(corpus.train[0]), len(corpus.heldout[0])]
    lines = run_lines(config, mesh, params, corpus, Progress(step=5, tokens_seen=5 * 256, data=None))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    text = "\n".join(lines)
    for expected in (
        f"nano:\n  model     {short(total)} parameters, ",
        "2 layers and 1 for MTP, 8 experts of which 2 per token",
        f"{documents[0]:,} document",
        f"{documents[0]}k tokens, {documents[0]}kB, ",
        f"held out {documents[1] / 10:.2%}: {documents[1]:,} document",
        "60 steps of 8 sequences of 32 tokens: 15.4k tokens",
        "learning rate up to 0.003, 0.0003 at the end, 5 steps of warm-up",
        "8 x cpu",
        "mesh data 4, expert 2",
        "precision fp32, attention xla (auto), experts blocks (auto), exchange dense (auto)",
        "continues after step 5 of 60",
    ):
        assert expected in text, text


def test_a_warm_up_longer_than_the_run_is_told(config):
    assert rates_line(config.with_(optimizer={"warmup_steps": 60})).endswith("60 steps of warm-up")
    told = rates_line(config.with_(optimizer={"warmup_steps": 61}))
    assert told.endswith("more than the run has, so the rate stays below: lower optimizer.warmup_steps")


def test_epochs_count_what_is_trained_on(config, tmp_path):
    corpus = open_corpus(config, byte_tokenizer(), tmp_path / "run")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = abstract_state(config, mesh)["params"]
    lines = run_lines(config, mesh, params, corpus, Progress(step=0, tokens_seen=0, data=None))
    tokens = corpus.train[0].num_tokens + 2 * len(corpus.train[0])
    assert f", {config.training.num_tokens / tokens:.2g} epochs; held out" in "\n".join(lines)
    assert lines[-1] == "starts: step 1 of 60"


@pytest.mark.parametrize("ramp", [(("constant", 1.0, 8.0),), (("constant", 0.3, 8.0), ("constant", 1.0, 20.0))])
def test_steps_are_those_that_the_loop_takes(ramp):
    config = from_config_dict(tiny.get_config()).with_(training={"batch_size": ramp, "num_tokens": 1e6})
    steps = seen = 0
    while seen < config.training.num_tokens:
        seen += batch_size(config, seen) * config.data.sequence_length
        steps += 1
    assert num_steps(config) == steps


def test_counts_are_short():
    assert [short(n) for n in (671e9, 14.8e12, 9_842_000, 1500, 512)] == ["671B", "14.8T", "9.84M", "1.5k", "512"]


def test_a_run_says_whose_weights_it_begins_with(config):
    begins = config.with_(training={"initial_weights": "runs/other@500"})
    assert position_line(begins, Progress(step=0, tokens_seen=0, data=None)).endswith(
        "with the weights of runs/other@500"
    )
    assert "weights" not in position_line(config, Progress(step=0, tokens_seen=0, data=None))
