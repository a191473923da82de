"""The command `experiments.generate` on a workdir with a checkpoint of random weights."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.completions import complete
from deepseek_jax.inference.generate import expert_mesh, stream, stream_ids
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model import transformer
from deepseek_jax.parameters import Weights, partition_specs
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.workdir import claim_workdir, read_tokenizer
from tests.support import compiling
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("generate")  # what one worker made or compiled, its other tests use

ROOT = Path(__file__).parents[2]


def make_config():
    config = get_config()
    config.model.update(
        vocab_size=262, width=32, num_layers=2, num_heads=2, query_latent=16, kv_latent=16, content_dim=8, rotary_dim=4
    )
    config.model.update(value_dim=8, dense_hidden=32, num_experts=8, expert_hidden=16)
    config.data.update(tokenizer="byte", sequence_length=64)
    config.mesh.data = 1
    return from_config_dict(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir at step 3, and what it was made of."""
    workdir, config = tmp_path_factory.mktemp("run"), make_config()
    claim_workdir(workdir, config)
    byte_tokenizer().save(workdir / "tokenizer.json")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        functools.partial(transformer.init, config.model), jax.eval_shape(lambda: jax.random.key(0))
    )
    params, router_bias = jax.tree.map(lambda leaf: jnp.array(0.5 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        state = {"params": jax.tree.map(jax.device_put, params, partition_specs(params)), "router_bias": router_bias}
        checkpoints = Checkpoints(workdir, keep=1)
        checkpoints.save(state, Progress(step=3, tokens_seen=0, data=None), config, read_tokenizer(workdir), mesh)
        checkpoints.close()
    return workdir, config, params, router_bias


def command(workdir, *options):
    arguments = [sys.executable, "-m", "experiments.generate", f"--workdir={workdir}", *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.FLAGS}
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prints_the_prompt_and_its_continuation(run, temperature):
    workdir, config, params, router_bias = run
    done = command(workdir, "--prompt=if x:", f"--temperature={temperature}", "--max_new_tokens=30", "--seed=5")
    sampling = Sampling(temperature=temperature, top_p=1.0, top_k=0)
    text = "".join(stream(config, Weights(params, router_bias), byte_tokenizer(), "if x:", 30, sampling, seed=5))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"if x:{text}\n" and text


@pytest.mark.slow
def test_a_file_of_prompts_becomes_a_file_of_completions(run, tmp_path):
    """In the order of the file and with its other keys; two batches of two, of which the last is half empty."""
    workdir, config, params, router_bias = run
    requests = [{"prompt": "if x:", "id": 7}, {"prompt": "a"}, {"prompt": "while True:"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, requests)))
    options = f"--prompts={tmp_path}/prompts.jsonl", f"--out={tmp_path}/new/out.jsonl", "--batch_size=2"
    done = command(workdir, *options, "--temperature=1", "--max_new_tokens=20", "--seed=5", "--stop=e")
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0)
    want = complete(
        config,
        Weights(params, router_bias),
        byte_tokenizer(),
        [request["prompt"] for request in requests],
        20,
        sampling,
        5,
        stop=["e"],
    )
    for request, line, found in zip(requests, got, want, strict=True):
        assert line == request | {
            "completion": found.text,
            "finish_reason": found.reason,
            "num_tokens": found.num_tokens,
        }
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl", "new"] and done.stdout == ""


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (9, "9 expert devices are asked for, and there are 8; lower --expert_devices"),
        (3, r"config.model.num_experts = 8 cannot be split over 3 devices"),
    ],
)
def test_devices_that_cannot_share_the_experts_are_refused(count, message):
    with pytest.raises(ValueError, match=message):
        expert_mesh(make_config().model, count)


COLD = Sampling(temperature=1e-45, top_p=1.0, top_k=0)


def test_nothing_is_made_of_weights_that_are_not_numbers(run):
    _, config, params, router_bias = run
    broken = params | {"final_norm_D": params["final_norm_D"] * jnp.nan}
    with pytest.raises(ValueError, match="the logits are NaN or infinite: the weights are damaged; take"):
        next(stream(config, Weights(broken, router_bias), byte_tokenizer(), "if x:", 30, COLD, seed=5))


def test_ids_beyond_the_vocabulary_are_refused(run):
    """They would be read as the last id."""
    _, config, params, router_bias = run
    more = byte_tokenizer()
    more.vocab_size += 1
    weights = Weights(params, router_bias)
    with pytest.raises(ValueError, match="the tokenizer has ids up to 262, and model.vocab_size is 262; use"):
        next(stream(config, weights, more, "if x:", 30, COLD, seed=5))
    for wrong in (-1, 262):
        with pytest.raises(ValueError, match="the prompts have ids beyond 0 to 261"):
            next(stream_ids(config, weights, np.array([[0, wrong]]), 30, COLD, 5, 1))


@pytest.mark.parametrize(
    ("prompt", "seed", "message"),
    [("caf\udce9", 5, "is not text that UTF-8 can write"), ("x", 2**63, "does not fit into 64 bits")],
)
def test_prompts_and_seeds_that_no_model_takes(run, prompt, seed, message):
    _, config, params, router_bias = run
    with pytest.raises(ValueError, match=message):
        next(stream(config, Weights(params, router_bias), byte_tokenizer(), prompt, 30, COLD, seed=seed))


@pytest.mark.slow
def test_says_what_is_missing(run, tmp_path):
    assert f"{tmp_path} holds no run" in command(tmp_path, "--prompt=x").stderr
    assert (
        "has no checkpoint of step 4; it has [3]"
        in command(run[0], "--prompt=x", "--step=4", "--max_new_tokens=9").stderr
    )
    assert "a prompt of 101 tokens" in command(run[0], f"--prompt={'x' * 100}").stderr
