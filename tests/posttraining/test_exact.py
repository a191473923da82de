"""Exact arithmetic: sampling and scoring have the same log-probabilities, bit for bit, and the same routes."""

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.job import Job
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.posttraining.rollouts import make_batch, rows_of, sample_groups, whole_routes
from deepseek_jax.posttraining.scoring import exact_scores, flipped
from tests.inference.test_decode import make_config
from tests.support.drawn import drawn_weights
from tests.support.drawn_adapters import with_adapters
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("exact")  # one engine for all

TOKENIZER = byte_tokenizer()
CONFIG = make_config(vocab_size=TOKENIZER.vocab_size).with_(
    data={"sequence_length": 192}, training={"micro_batch_size": 8}
)
LENGTH = 160
RNG = np.random.default_rng(0)
SHARED = RNG.integers(6, 250, 70).tolist()  # more than a page, so the cache has it for all but the first
PROMPTS = [(i, [*SHARED, *RNG.integers(6, 250, 5 + 9 * i).tolist()]) for i in range(4)]
KEPT = {
    "prompt": SHARED,
    "max_new_tokens": 4,
    "sampling": Sampling(temperature=1.0, top_k=0, top_p=0.9, num_logprobs=0),
    "kept": True,
}


def make_weights(config):
    """A head whose draws are not always the most probable token, so drafts are sometimes right."""
    weights = drawn_weights(config.model)
    return weights._replace(params=weights.params | {"head_DV": 0.3 * weights.params["head_DV"]})


def rolled_out(config, num_drafts=0, exact=True, weights=None):
    """(the engine's counts, samples, their batch, and its scores by the engine)."""
    sizes = {"num_rows": 12, "num_pages": 80, "num_positions": 192, "most_prefill_tokens": 128}
    options = {"eos": TOKENIZER.eos, "num_drafts": num_drafts, "exact": exact} | sizes
    with Engine(DeviceBatch(config, weights or make_weights(config), mesh_of(), **options), TOKENIZER) as engine:
        samples = sample_groups(engine, PROMPTS, 4, 40, seed=1, routes=True)
        batch = make_batch(samples, RNG.normal(size=16), np.ones(16, bool), LENGTH, TOKENIZER.pad)
        if exact:
            with pytest.raises(ValueError, match="kept = True has log-probabilities among .* exact=False"):
                engine.submit(Job(**KEPT), print)
        return engine.stats(), samples, batch, exact_scores(engine, batch)


def check_equal(config, stats, samples, batch, scored):
    """Some of a prompt's tokens were prefilled, others cached, the rest decoded among other rows; now they are one."""
    assert stats.cached_tokens > 600
    assert scored.logprobs_BS.tobytes() == batch["sampler_logprobs_BS"].tobytes() and scored.logprobs_BS.any()
    routes = rows_of(whole_routes(samples), LENGTH)
    assert (routes >= 0).all(-1).sum() == (batch["segment_ids_BS"] > 0).sum()  # those of cached tokens, too
    assert flipped(batch, routes, scored.routes_BSLK) == 0.0
    assert flipped(batch, routes, (routes + 1) % config.model.num_experts) == 1.0


def test_scores_are_the_samplers_bit_for_bit_with_a_prefix_cache():
    check_equal(CONFIG, *rolled_out(CONFIG))


@pytest.mark.slow
def test_scores_are_the_samplers_bit_for_bit_with_drafts_too():
    """And with adapters beside the weights."""
    config = CONFIG.with_(model={"num_mtp_layers": 1})
    adapted, _ = with_adapters(make_weights(config), mesh_of(), 0.1)
    stats, *rest = rolled_out(config, num_drafts=1, weights=adapted)
    assert 100 < stats.accepted[0] < stats.drafted[0]
    check_equal(config, stats, *rest)
    _, batch, scored = rolled_out(config, num_drafts=1, exact=False)[1:]
    carried_BS = batch["loss_weights_BS"] > 0
    equal = (batch["sampler_logprobs_BS"] == scored.logprobs_BS)[carried_BS]
    assert 0 < equal.sum() < equal.size  # by fast arithmetic some tokens differ
    np.testing.assert_allclose(batch["sampler_logprobs_BS"], scored.logprobs_BS, atol=1e-4)
