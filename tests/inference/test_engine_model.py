"""The engine over a small model in FP32: jobs together get what each gets alone, and what teacher forcing says."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference import row_calls
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import Job
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model import transformer
from tests.inference.test_decode import make_config
from tests.support.drawn import drawn_weights
from tests.support.meshes import mesh_of
from tests.support.patience import SECONDS, wait_for

pytestmark = pytest.mark.xdist_group("engine_model")  # what is compiled once, serves all tests

TOKENIZER = byte_tokenizer()
CONFIG = make_config(vocab_size=TOKENIZER.vocab_size).with_(data={"sequence_length": 256})
WARM = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3)


def make_weights(version=0):
    """Other versions have another head."""
    weights = drawn_weights(CONFIG.model)
    return weights._replace(
        params=weights.params | {"head_DV": jnp.roll(weights.params["head_DV"], 7 * version, axis=1)}
    )


@pytest.fixture(scope="module")
def batch():
    """One for all tests: an engine leaves all its rows closed. Programs are compiled where a test needs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_calls, "FEW_ROWS_ON_CPU", 8)
        sizes = {"num_rows": 8, "num_pages": 60, "num_positions": 256, "most_prefill_tokens": 128}
        return DeviceBatch(CONFIG, make_weights(), mesh_of(), eos=TOKENIZER.eos, **sizes)


class Smaller:
    """A batch of which an engine uses fewer pages."""

    def __init__(self, batch, num_pages):
        self._batch, self.num_pages = batch, num_pages

    def __getattr__(self, name):
        return getattr(self._batch, name)


class Held:
    """A batch whose steps wait: the first to come sets `begun`, and all go on after `go`."""

    def __init__(self, batch):
        self._batch = batch
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def __getattr__(self, name):
        return getattr(self._batch, name)

    def step(self, *arguments):
        self.begun.set()
        assert self.go.wait(SECONDS)
        return self._batch.step(*arguments)


def make_jobs(count, seed=7):
    """Greedy and drawn jobs, with penalties and a bias; half of the prompts begin alike."""
    rng = np.random.default_rng(seed)
    shared, jobs = rng.integers(6, 250, 200).tolist(), []
    for i in range(count):
        prompt = rng.integers(6, 250, rng.integers(1, 120)).tolist()
        if i % 2:
            prompt = shared[: rng.integers(60, 200)] + prompt[:20]
        sampling, own = (WARM, Request(seed=i, logit_bias={70: 1.5})) if i % 3 == 2 else (GREEDY, Request())
        jobs.append(Job(prompt=prompt, max_new_tokens=int(rng.integers(1, 24)), sampling=sampling, own=own))
    return jobs


@functools.cache
def forced():
    """Return the program of teacher forcing, by the training form."""

    @jax.jit
    def logprobs(weights, tokens_BS):
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        inputs = transformer.Inputs(tokens_BS, positions_BS, jnp.ones_like(tokens_BS, dtype=bool))
        hidden_BSD = transformer.apply(CONFIG.model, CONFIG.execution, weights, inputs).hidden_BSD
        return jax.nn.log_softmax(hidden_BSD @ weights.params["head_DV"])

    return logprobs


def teacher_forced(sequences, version=0):
    """Log-probabilities [S, V] of the token after each of a sequence."""
    found = []
    for start in range(0, len(sequences), 8):
        tokens_BS = np.zeros((8, 256), np.int32)
        for row, ids in zip(tokens_BS, sequences[start : start + 8], strict=False):
            row[: len(ids)] = ids
        logprobs_BSV = np.asarray(forced()(make_weights(version), tokens_BS))
        found += [rows[: len(ids)] for rows, ids in zip(logprobs_BSV, sequences[start : start + 8], strict=False)]
    return found


def check_greedy(jobs, answers, version=0):
    """Each token is the most probable one after those before it."""
    chosen = [(job, answer) for job, answer in zip(jobs, answers, strict=True) if job.sampling is GREEDY]
    logprobs = teacher_forced([[*job.prompt, *answer.ids] for job, answer in chosen], version)
    for (job, answer), logprobs_SV in zip(chosen, logprobs, strict=True):
        want = logprobs_SV[len(job.prompt) - 1 :].argmax(-1).tolist()
        assert answer.ids == want[: len(answer.ids)]
        ended = len(answer.ids) == job.max_new_tokens or want[len(answer.ids)] == TOKENIZER.eos
        assert ended and answer.text == TOKENIZER.decode(answer.ids)


def texts_of(answers):
    return [(answer.text, answer.ids, answer.finish_reason) for answer in answers]


def check_pages_are_back(engine):
    """A row is given back behind the last delta, so a listener may look before."""
    wait_for(lambda: not (engine.stats().waiting or engine.stats().running or engine.stats().pages_used))


@pytest.mark.parametrize("count", [48, pytest.param(500, marks=pytest.mark.slow)])
def test_jobs_together_are_jobs_alone(batch, count):
    """At once, in another order, one at a time without a prefix in the cache, and in a cache that is too small."""
    settings = (GREEDY, Request()), (WARM, Request(seed=3)), (GREEDY, Request())
    long = [Job(prompt=[70] * 5, max_new_tokens=150, sampling=sampling, own=own) for sampling, own in settings]
    jobs = [*long, *make_jobs(count)]
    with Engine(batch, TOKENIZER, most_waiting=len(jobs)) as engine:
        answers = engine.generate(jobs)
        check_pages_are_back(engine)
        assert engine.stats().cached_tokens > 0
        assert texts_of(engine.generate(jobs[::-1])) == texts_of(answers[::-1])
    check_greedy(jobs, answers)
    with Engine(Smaller(batch, 5), TOKENIZER) as engine:
        assert texts_of(engine.generate(jobs)) == texts_of(answers)
        assert engine.stats().preemptions > 0
        check_pages_are_back(engine)
    with Engine(batch, TOKENIZER) as engine:
        for job, answer in list(zip(jobs, answers, strict=True))[:60]:
            assert texts_of(engine.generate([job])) == texts_of([answer])


def test_some_are_cancelled_and_nobody_is_mixed_up(batch):
    jobs = make_jobs(60, seed=8)
    with Engine(Smaller(batch, 12), TOKENIZER) as engine:
        whole = engine.generate(jobs)
        ended, answers = threading.Semaphore(0), {}

        def listen(i, delta):
            answers.setdefault(i, []).extend(delta.ids)
            if i % 4 == 0 and len(answers[i]) >= i // 8:
                tickets[i].cancel()
            if delta.finish_reason is not None:
                ended.release()

        tickets = {}
        engine.pause()
        for i, job in enumerate(jobs):
            tickets[i] = engine.submit(job, functools.partial(listen, i))
        engine.resume()
        for _ in jobs:
            assert ended.acquire(timeout=SECONDS)
        check_pages_are_back(engine)
        assert engine.stats().finished["cancelled"] > 5
    for i, answer in enumerate(whole):
        assert answers[i] == (answer.ids if i % 4 else answer.ids[: len(answers[i])])


def test_log_probabilities_are_those_of_teacher_forcing(batch):
    """Of prompts, whether the cache has them or not, and of new tokens."""
    rng = np.random.default_rng(9)
    prompts = [rng.integers(6, 250, length).tolist() for length in (1, 2, 64, 65, 129, 240)]
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, num_logprobs=3)
    with Engine(batch, TOKENIZER) as engine:
        found = engine.log_probabilities(prompts, num_top=2)
        assert engine.log_probabilities(prompts, num_top=2) == found
        job = Job(prompt=prompts[3], max_new_tokens=9, sampling=sampling, ignore_eos=True, prompt_logprobs=0)
        answer = engine.generate([job])[0]
    for prompt, entries, logprobs_SV in zip(prompts, found, teacher_forced(prompts), strict=True):
        check_logprobs(entries, prompt[1:], logprobs_SV, num_top=2)
    (logprobs_SV,) = teacher_forced([[*prompts[3], *answer.ids]])
    check_logprobs(answer.prompt_logprobs[1:], prompts[3][1:], logprobs_SV, num_top=0)
    check_logprobs(answer.logprobs, answer.ids, logprobs_SV[64:], num_top=3)


def check_logprobs(entries, tokens, logprobs_SV, num_top):
    assert [entry.token for entry in entries] == tokens
    for entry, logprobs_V in zip(entries, logprobs_SV, strict=False):
        assert entry.logprob == pytest.approx(logprobs_V[entry.token], abs=2e-5)
        top = np.sort(logprobs_V)[::-1][:num_top]
        np.testing.assert_allclose([value for _, value in entry.top], top, atol=2e-5)


def test_what_tokens_were_drawn_among_can_be_replayed(batch):
    """The ratio of the training form, over the kept ids, to what the sampler says of its draws is 1."""
    ways = [(0.8, 0, 0.8), (1.3, 7, 1.0), (1.0, 30, 0.5), (1.2, 0, 1.0)]
    samplings = [Sampling(temperature=t, top_k=k, top_p=p) for t, k, p in ways]
    jobs = [
        Job(prompt=[90 + i] * 9, max_new_tokens=24, sampling=s, own=Request(seed=i, num_logprobs=0), kept=True)
        for i, s in enumerate(samplings * 2)
    ]
    with Engine(batch, TOKENIZER) as engine:
        answers = engine.generate([*jobs, dataclasses.replace(jobs[0], kept=False)])
        with pytest.raises(ValueError, match="kept = True is for draws at a temperature above 0"):
            engine.generate([dataclasses.replace(jobs[0], sampling=GREEDY)])
        with pytest.raises(ValueError, match="kept = True comes with log-probabilities; set num_logprobs"):
            engine.generate([dataclasses.replace(jobs[0], own=Request())])
    assert answers[-1].ids == answers[0].ids and {entry.drawn for entry in answers[-1].logprobs} == {None}
    ratios, plain = [], []
    for job, answer, forced_SV in zip(
        jobs, answers, teacher_forced([[*j.prompt, *a.ids] for j, a in zip(jobs, answers, strict=False)]), strict=False
    ):
        t, k, p = job.sampling.temperature, job.sampling.top_k, job.sampling.top_p
        for entry, logprobs_V in zip(answer.logprobs, np.float64(forced_SV[len(job.prompt) - 1 :]), strict=False):
            kept_V = np.unpackbits(entry.drawn.words_W.view(np.uint8), bitorder="little")[: len(logprobs_V)] > 0
            probabilities_V = np.exp(logprobs_V / t) / np.exp(logprobs_V / t).sum()
            inside = probabilities_V[kept_V]
            assert kept_V[entry.token] and inside.min() >= probabilities_V[~kept_V].max(initial=0.0) - 1e-5
            assert kept_V.sum() == k or not (k and p == 1.0)
            if p < 1 and not k:
                assert inside.sum() >= p - 1e-4 and inside.sum() - inside.min() < p + 1e-4
            assert kept_V.all() or (k, p) != (0, 1.0)
            own = np.log(probabilities_V[entry.token])
            ratios.append(np.exp(own - np.log(inside.sum()) - entry.drawn.logprob))
            plain.append(np.exp(own - entry.drawn.logprob))
    assert len(ratios) > 150 and abs(np.mean(ratios) - 1.0) < 1e-6 and np.abs(np.log(ratios)).max() < 2e-5
    assert np.mean(plain) < 0.9  # what the ratio is without the kept ids


def test_routes_of_every_token_come_once(batch):
    """Of the prompt and all tokens but the last, which does not go through the model; the same after preemption."""
    jobs = [
        Job(prompt=[70 + i] * 70, max_new_tokens=90, sampling=GREEDY, ignore_eos=True, routes=True) for i in range(3)
    ]
    found = []
    for i, num_pages in enumerate((60, 5)):
        with Engine(Smaller(batch, num_pages), TOKENIZER) as engine:
            found.append(engine.generate([dataclasses.replace(job, salt=i) for job in jobs]))
            assert (engine.stats().preemptions > 0) == (num_pages == 5)
            again = engine.generate([dataclasses.replace(jobs[2], salt=i)])[0]
    for roomy, tight in zip(*found, strict=True):
        assert roomy.routes_TLK.shape == (70 + 90 - 1, 1, CONFIG.model.experts_per_token)
        np.testing.assert_array_equal(np.sort(roomy.routes_TLK), np.sort(tight.routes_TLK))
    assert len(again.routes_TLK) == 159 - again.usage.cached_tokens and again.usage.cached_tokens == 64
    np.testing.assert_array_equal(np.sort(again.routes_TLK), np.sort(found[0][2].routes_TLK[64:]))


def test_new_weights_while_jobs_run(batch):
    """Those that run end on the old weights, the others begin with the new, also with an old prefix."""
    jobs = [job for job in make_jobs(24, seed=10) if job.sampling is GREEDY]
    held = Held(batch)
    with Engine(held, TOKENIZER) as engine:
        before, thread = [], threading.Thread(target=lambda: before.extend(engine.generate(jobs)))
        engine.generate(jobs[:1])
        engine.pause()
        thread.start()
        wait_for(lambda: engine.stats().waiting >= len(jobs))
        held.begun.clear()
        held.go.clear()
        engine.resume()
        assert held.begun.wait(SECONDS)
        updating = threading.Thread(target=engine.update_weights, args=(make_weights(1),))
        updating.start()
        wait_for(lambda: engine._inbox._requests)
        held.go.set()
        updating.join(SECONDS)
        after = engine.generate(jobs)
        thread.join(SECONDS)
        engine.update_weights(make_weights(0), version=0)
        assert texts_of(engine.generate(jobs[:2])) == texts_of(engine.generate(jobs[:2]))
    check_greedy(jobs, after, version=1)
    for version in (0, 1):
        pairs = [(job, answer) for job, answer in zip(jobs, before, strict=True) if answer.versions[0] == version]
        assert pairs
        check_greedy(*zip(*pairs, strict=True), version=version)
    assert all(len(set(answer.versions)) == 1 for answer in before)


@pytest.mark.slow
def test_open_compiles_everything_before_the_first_job(capsys):
    jobs = make_jobs(20)
    sizes = {"num_rows": 4, "num_positions": 256, "most_prefill_tokens": 256}
    with Engine.open(CONFIG, make_weights(), TOKENIZER, **sizes) as engine:
        compiled = []
        jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
        answers = engine.generate(jobs)
        assert not [name for name in compiled if "backend_compile" in name]
        assert engine.stats().pages == 16
    check_greedy(jobs, answers)
    with pytest.raises(ValueError, match="256, which the model knows"):
        Engine.open(CONFIG, make_weights(), TOKENIZER, num_positions=257)


@pytest.mark.slow
def test_four_devices_are_one(batch):
    """Each has pages of its own, too few for its rows."""
    long = [Job(prompt=[70 + i] * 5, max_new_tokens=150, sampling=GREEDY, ignore_eos=True) for i in range(8)]
    jobs = [*long, *make_jobs(30)]
    mesh = mesh_of(data=2, expert=2)
    options = {"num_rows": 8, "num_pages": 5, "num_positions": 256, "most_prefill_tokens": 128, "silent": True}
    with Engine(batch, TOKENIZER) as engine:
        want = texts_of(engine.generate(jobs))
    with Engine.open(CONFIG, make_weights(), TOKENIZER, mesh, **options) as engine:
        assert texts_of(engine.generate(jobs)) == want
        assert engine.stats().preemptions > 0
        check_pages_are_back(engine)


@pytest.mark.slow
def test_drafts_change_no_greedy_text():
    """Nor log-probabilities; with stop strings, prefixes, pages that run out, and jobs that are cancelled."""
    config = make_config(vocab_size=TOKENIZER.vocab_size, num_mtp_layers=1).with_(data={"sequence_length": 256})
    weights, sizes = drawn_weights(config.model), {"num_rows": 4, "num_positions": 256, "most_prefill_tokens": 128}
    logged = Sampling(temperature=0.0, top_k=0, top_p=1.0, num_logprobs=2)
    jobs = [dataclasses.replace(job, sampling=logged, own=Request()) for job in make_jobs(30)]
    jobs = [Job(prompt=[70] * 5, max_new_tokens=150, sampling=logged), *jobs]
    with Engine.open(config, weights, TOKENIZER, mesh_of(), silent=True, **sizes) as engine:
        want = engine.generate(jobs)
        stop = want[0].text[40:43]
        want[0] = engine.generate([dataclasses.replace(jobs[0], stop=[stop])])[0]
        jobs[0] = dataclasses.replace(jobs[0], stop=[stop])
    options = {"num_pages": 6, "num_drafts": 3, "silent": True}
    with Engine.open(config, weights, TOKENIZER, mesh_of(), **sizes, **options) as engine:
        engine.submit(jobs[1], lambda _: None).cancel()
        found = engine.generate(jobs)
        engine.update_weights(weights)
        again = engine.generate(jobs[::-1])[::-1]
        check_pages_are_back(engine)
        stats = engine.stats()
    assert texts_of(found) == texts_of(want) == texts_of(again)
    assert sum(stats.drafted) > 0 and stats.cached_tokens > 0
    for answer, other in zip(found, want, strict=True):
        assert [entry.token for entry in answer.logprobs] == answer.ids
        got, expected = ([entry.logprob for entry in a.logprobs] for a in (answer, other))
        np.testing.assert_allclose(got, expected, atol=2e-5)
