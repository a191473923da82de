"""Rows that open, decode and close at different times get what each would get alone."""

import dataclasses
import functools
import re
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference import generate, row_programs
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.batch_checks import check_burst
from deepseek_jax.inference.page_pool import PagePool
from deepseek_jax.inference.pages import Copy, PagedSequence
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.row_sampling import KINDS
from deepseek_jax.inference.row_state import RowSettings
from deepseek_jax.inference.sampling import NO_TOKEN, Sampling
from deepseek_jax.inference.step import Piece
from deepseek_jax.model import transformer
from deepseek_jax.model.moe import chosen_experts
from tests.inference.test_decode import CONFIG, GREEDY, NEVER, expanded_logits, make_weights
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("batch")  # what is compiled once, serves all tests

ROWS, PAGES, POSITIONS, BUDGET = 6, 14, 320, 128
SEED = 11
TOKENS = np.random.default_rng(5).integers(0, 300, (8, 300)).tolist()
SHARED = TOKENS[7][:140]
PROMPTS = [TOKENS[0][:5], TOKENS[1][:230], SHARED, TOKENS[3][:64], SHARED[:130] + TOKENS[4][:9], TOKENS[5][:1]]
LENGTHS = [20, 7, 12, 1, 9, 30]
WARM = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2, presence_penalty=-3.0)

DRAWN = dataclasses.replace(WARM, top_k=0, top_p=1.0, num_logprobs=0)
BY_ID = dataclasses.replace(DRAWN, presence_penalty=0.5)


def make_batch(config=CONFIG, weights=None, mesh=None, rows=ROWS, eos=NEVER):
    sizes = {"num_rows": rows, "num_pages": PAGES, "num_positions": POSITIONS, "most_prefill_tokens": BUDGET}
    return DeviceBatch(config, weights or make_weights(config), mesh or mesh_of(), eos=eos, **sizes, burst=4)


@pytest.fixture(scope="module")
def batch():
    made = make_batch()
    made.compile()
    return made


class Job:
    def __init__(self, prompt, **settings):
        self.prompt, self.settings = list(prompt), settings
        self.tokens, self.finished, self.sequence, self.row, self.done = [], False, None, None, 0


class Host:
    """As simple an engine as there can be: `ahead` steps are dispatched before the first of them is read."""

    def __init__(self, batch, ahead=2):
        self.batch, self.ahead = batch, ahead
        self.pools = [PagePool(PAGES) for _ in range(batch.num_devices)]
        self.flying = deque()

    def run(self, jobs, most_running=3):
        waiting, running = deque(jobs), []
        while waiting or running:
            if waiting and len(running) < most_running:  # one a step: they begin at different times
                running.append(self.open(waiting.popleft(), {job.row for job in running}))
            pieces, rows_B = self.pieces(running), np.zeros(self.batch.num_rows, bool)
            rows_B[[job.row for job in running if job.started]] = True
            self.flying.append((self.batch.step(pieces, rows_B), list(running)))
            for job in running:
                job.started = job.done == len(job.prompt)
            if len(self.flying) > self.ahead:
                self.read()
                for job in [job for job in running if job.finished]:
                    running.remove(job)
                    self.close(job)
        while self.flying:
            self.read()
        return jobs

    def open(self, job, taken):
        each = self.batch.num_rows // self.batch.num_devices
        free = [row for row in range(self.batch.num_rows) if row not in taken]
        job.row = min(free, key=lambda row: (row % each, row))  # devices in turn
        job.sequence = PagedSequence.open(self.pools[self.batch.device_of(job.row)], job.prompt)
        job.done, job.cached, job.started = len(job.sequence), len(job.sequence), False
        assert not job.sequence.reserve(len(job.prompt) + job.settings["max_new_tokens"] - job.done)
        self.batch.open_row(job.row, RowSettings(**job.settings, prompt=job.prompt, length=job.done))
        table = np.zeros(job.sequence.num_pages, np.int32)
        job.sequence.fill(table)
        self.batch.set_table(job.row, table)
        return job

    def pieces(self, running):
        pieces, left = [], [BUDGET] * self.batch.num_devices
        for job in running:
            device = self.batch.device_of(job.row)
            ids = job.prompt[job.done : job.done + min(left[device], 100)]
            if ids:
                left[device] -= len(ids)
                job.done += len(ids)
                job.sequence.commit(ids)
                pieces.append(Piece(job.row, ids, job.done == len(job.prompt)))
        return pieces

    def read(self):
        step, running = self.flying.popleft()
        result = step.read()
        for job in running:
            job.tokens += result.tokens_BK[job.row, : result.counts_B[job.row]].tolist()
            job.finished |= bool(result.finished_B[job.row])

    def close(self, job):
        self.batch.close_row(job.row)
        job.sequence.close()


def alone(prompt, num_tokens, sampling, number=0, weights=None):
    """What `generate` gives the prompt as request `number`."""
    new = generate.stream_ids(
        CONFIG, weights or make_weights(), [prompt], num_tokens, sampling, SEED, NEVER, mesh_of(), None, number
    )
    return np.concatenate(list(new), axis=1)[0].tolist()


def jobs_of(samplings):
    every = zip(PROMPTS, LENGTHS, samplings, range(len(PROMPTS)), strict=True)
    return [Job(p, max_new_tokens=n, sampling=s, seed=SEED, number=i) for p, n, s, i in every]


def test_rows_get_what_each_gets_alone(batch):
    """Greedy and drawn, in three of six rows, prompts in pieces beside decoding; one finds another's pages."""
    samplings = [GREEDY, WARM, DRAWN, WARM, GREEDY, BY_ID]
    jobs = Host(batch).run(jobs_of(samplings))
    for i, job in enumerate(jobs):
        assert job.tokens == alone(PROMPTS[i], LENGTHS[i], samplings[i], number=i), i
    assert [job.cached for job in jobs] == [0, 0, 0, 0, 128, 0]


@pytest.mark.parametrize(
    ("sampling", "second"),
    [(GREEDY, 1), (WARM, 1), (DRAWN, 1), (BY_ID, 1), (DRAWN, 5)],
    ids=["greedy", "any", "drawn", "by id", "in bulk"],
)
def test_a_burst_tells_what_single_steps_tell(batch, sampling, second, monkeypatch):
    """Tokens, log-probabilities, experts and ends, where one row ends within a burst and the other behind it."""
    monkeypatch.setattr(batch, "burst_rows", max(batch.burst_rows, second + 1))
    both = 0, second
    rows_B, found = np.isin(np.arange(ROWS), both), []
    for plan in ([1] * 10, [4, 4, 1, 1]):
        tokens, logprobs, routes, ends = ([[], []] for _ in range(4))
        for row, place, most in ((0, 0, 11), (second, 1, 6)):
            settings = {"sampling": sampling, "max_new_tokens": most, "seed": SEED, "number": place, "routes": True}
            batch.open_row(row, RowSettings(**settings))
            batch.set_table(row, [3 * place, 3 * place + 1])
        batch.step([Piece(row, PROMPTS[0], True) for row in both], rows_B & False).read()
        for step in [batch.step([], rows_B, num_tokens) for num_tokens in plan]:
            result = step.read()
            for place, row in enumerate(both):
                count = result.counts_B[row]
                tokens[place] += result.tokens_BK[row, :count].tolist()
                logprobs[place] += [] if result.logprobs is None else result.logprobs.chosen_B[row, :count].tolist()
                routes[place] += result.routes[row].tolist()
                ends[place].append(bool(result.finished_B[row]))
        for row in both:
            batch.close_row(row)
        assert [len(ids) for ids in tokens] == [10, 5] == [len(found) for found in routes]
        assert all(end[-1] for end in ends) and not ends[0][0]
        found.append((tokens, routes, logprobs))
    (*single, logprobs), (*burst, others) = found
    assert single == burst
    assert [len(values) for values in logprobs] == ([10, 5] if sampling in (DRAWN, BY_ID) else [0, 0])
    for one, other in zip(logprobs, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_in_bulk_there_are_programs_for_bursts_of_all_rows(batch, monkeypatch):
    calls = batch._calls
    before = calls._names()
    monkeypatch.setattr(calls, "sizes", calls.sizes._replace(bulk=True))
    assert set(calls._names()) - set(before) == {("decode", ROWS, kind, 4) for kind in KINDS}
    assert calls.burst_widths[-1] == ROWS > batch.burst_rows


def test_bursts_that_cannot_be_are_refused(batch):
    rows_B = np.arange(ROWS) == 4
    for row, masked in ((4, False), (1, True)):
        batch.open_row(row, RowSettings(sampling=GREEDY, max_new_tokens=9, masked=masked))
        batch.set_table(row, [row])
    try:
        with pytest.raises(ValueError, match=r"rows \[4\] can have none"):
            batch.step([], rows_B, 4)
        with pytest.raises(ValueError, match="a step of 3 tokens: bursts here have 4"):
            batch.step([], rows_B, 3)
        batch.set_mask(1, np.zeros(-(-batch.vocab_size // 32), np.int32))
        with pytest.raises(ValueError, match=r"rows \[1\] are masked, and need set_mask"):
            batch.step([], np.arange(ROWS) == 1, 4)
    finally:
        batch.close_row(4)
        batch.close_row(1)
    with pytest.raises(ValueError, match="burst = 0 must be at least 1"):
        check_burst(0)


def test_no_program_is_compiled_while_jobs_run(batch):
    """Jobs of every kind, after `compile`."""
    jobs = jobs_of([GREEDY, WARM, Sampling(temperature=0.5, top_k=0, top_p=0.5, num_logprobs=3)] * 2)
    jobs[1].settings["own"] = Request(logit_bias={3: 1.0}, seed=4)
    compiled = []

    def listen(event, _, **__):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1.25)(1.0)
        assert any("compile" in event for event in compiled)  # so it counts
        compiled.clear()
        Host(batch).run(jobs)
        batch.open_row(0, RowSettings(sampling=GREEDY, max_new_tokens=0))
        batch.copy_pages(0, [Copy(1, 2)])
        batch.set_table(0, [0])
        batch.step([Piece(0, [1, 2], True, logprobs=True)], np.zeros(ROWS, bool)).read()
        batch.close_row(0)
        assert not [event for event in compiled if "compile" in event or "trac" in event]
    finally:
        jax.monitoring.clear_event_listeners() if not hasattr(
            jax.monitoring, "unregister_event_duration_listener"
        ) else (jax.monitoring.unregister_event_duration_listener(listen))


def test_the_first_token_is_chosen_by_the_least_program_that_serves_the_rows(batch, monkeypatch):
    """Noise of the vocabulary is made for no greedy row."""
    kinds, first = [], batch._calls.first
    monkeypatch.setattr(batch._calls, "first", lambda kind, *rest: kinds.append(kind) or first(kind, *rest))
    samplings = [GREEDY, dataclasses.replace(GREEDY, temperature=1.0, top_k=0, top_p=1.0), BY_ID, WARM]
    for row, sampling in enumerate(samplings):
        batch.open_row(row, RowSettings(sampling=sampling, max_new_tokens=1, seed=SEED, number=row, prompt=[3]))
        batch.set_table(row, [row])
        batch.step([Piece(row, [3], True)], np.zeros(ROWS, bool)).read()
    for row in range(len(samplings)):
        batch.close_row(row)
    assert kinds == list(KINDS)
    head_DV, rest = batch._calls._head, batch._calls._first_program(KINDS[0])[-1][1:]
    with jax.set_mesh(mesh_of()):
        greedy = str(jax.make_jaxpr(functools.partial(row_programs.first, KINDS[0]))(head_DV, *rest))
        drawn = str(jax.make_jaxpr(functools.partial(row_programs.first, KINDS[1]))(head_DV, *rest))
    assert "random" not in greedy and "random" in drawn


def test_a_row_that_has_ended_writes_nothing_though_steps_follow(batch):
    """Two more are dispatched before the first is read. Its pages are another row's then, who sees its own only."""
    prompt, others = TOKENS[6][:60], TOKENS[2][:70]
    tokens = alone(prompt, 6, GREEDY)
    end = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 1)
    batch.open_row(4, RowSettings(sampling=GREEDY, max_new_tokens=50, end_ids=[tokens[end]]))
    batch.set_table(4, [9, 3])
    rows_B = np.zeros(ROWS, bool)
    steps = [batch.step([Piece(4, prompt, True)], rows_B)]
    rows_B[4] = True
    steps += [batch.step([], rows_B) for _ in range(end)]
    before = np.asarray(batch._calls._pages)
    steps += [batch.step([], rows_B) for _ in range(2)]
    results = [step.read() for step in steps]
    assert [r.counts_B[4] for r in results] == [1] * (end + 1) + [0, 0]
    assert [r.tokens_BK[4, 0] for r in results[: end + 1]] == tokens[: end + 1]
    assert [bool(r.finished_B[4]) for r in results] == [False] * end + [True] * 3
    np.testing.assert_array_equal(before, np.asarray(batch._calls._pages))
    batch.close_row(4)
    batch.open_row(1, RowSettings(sampling=GREEDY, max_new_tokens=3))
    batch.set_table(1, [3, 9])
    first = batch.step([Piece(1, others, True)], np.zeros(ROWS, bool))
    rows_B = np.arange(ROWS) == 1
    got = [step.read().tokens_BK[1, 0] for step in (first, batch.step([], rows_B), batch.step([], rows_B))]
    batch.close_row(1)
    assert got == alone(others, 3, GREEDY)


def test_experts_of_every_token_are_those_of_the_training_form(batch):
    """Of a prompt in two pieces, behind another's piece, and of two tokens that went through the model."""
    prompt, load_before = TOKENS[6][:90], batch.expert_load()
    batch.open_row(1, RowSettings(sampling=GREEDY, max_new_tokens=0))
    batch.open_row(2, RowSettings(sampling=GREEDY, max_new_tokens=3, routes=True))
    batch.set_table(1, [7])
    batch.set_table(2, [4, 5])
    no_row, row_2 = np.zeros(ROWS, bool), np.arange(ROWS) == 2
    found = [
        batch.step([Piece(1, TOKENS[5][:9], True), Piece(2, prompt[:70], False)], no_row).read(),
        batch.step([Piece(2, prompt[70:], True)], no_row).read(),
        *(batch.step([], row_2).read() for _ in range(3)),
    ]
    batch.close_row(1)
    batch.close_row(2)
    assert all(result.routes.keys() == {2} for result in found)
    assert [len(result.routes[2]) for result in found] == [70, 20, 1, 1, 0]
    routes_TLK = np.concatenate([result.routes[2] for result in found])
    whole = prompt + [int(result.tokens_BK[2, 0]) for result in found[1:3]]
    inputs = transformer.Inputs(jnp.array([whole]), jnp.arange(92)[None], jnp.ones((1, 92), bool))
    options = {"observe": chosen_experts}
    run = jax.jit(lambda: transformer.apply(CONFIG.model, CONFIG.execution, make_weights(), inputs, **options).observed)
    assert routes_TLK.dtype == np.uint8 and routes_TLK.shape[1:] == (1, CONFIG.model.experts_per_token)
    np.testing.assert_array_equal(routes_TLK.swapaxes(0, 1), run()[:, 0])
    load_LE = batch.expert_load() - load_before  # the neighbour's nine tokens are in it, padding is not
    mine_E = np.bincount(routes_TLK.reshape(-1), minlength=CONFIG.model.num_experts)
    assert load_LE.sum() == (9 + 92) * CONFIG.model.experts_per_token and (load_LE[0] >= mine_E).all()


def test_a_prompt_after_which_nothing_is_wanted_ends_without_a_token(batch):
    batch.open_row(5, RowSettings(sampling=GREEDY, max_new_tokens=0))
    batch.set_table(5, [2])
    result = batch.step([Piece(5, [8, 9, 10], True, True)], np.zeros(ROWS, bool)).read()
    after = batch.step([], np.arange(ROWS) == 5).read()
    batch.close_row(5)
    assert (result.counts_B[5], after.counts_B[5]) == (0, 0) and result.finished_B[5]
    assert result.prompt_logprobs[5].chosen_B.shape == (2,)


def test_a_masked_row_takes_allowed_tokens_and_resumed_penalties_count_its_output(batch):
    """A row that goes on after a preemption draws as if it had not stopped."""
    tokens = alone(PROMPTS[0], 8, WARM)
    resumed = RowSettings(
        sampling=WARM, seed=SEED, number=0, max_new_tokens=4, prompt=PROMPTS[0], output=tokens[:4], ignore_eos=True
    )
    batch.open_row(0, resumed)
    batch.open_row(3, RowSettings(sampling=GREEDY, max_new_tokens=9, masked=True))
    batch.set_table(0, [7])
    batch.set_table(3, [8])
    allowed = [{5}, {40, 41}, {299}]
    steps = []
    for i in range(4):
        if i < 3:
            mask = np.zeros(320, bool)
            mask[list(allowed[i])] = True
            batch.set_mask(3, np.packbits(mask, bitorder="little").view("<i4"))
        rows_B = np.zeros(ROWS, bool)
        rows_B[0], rows_B[3] = i > 0, 0 < i < 3
        pieces = [] if i else [Piece(0, PROMPTS[0] + tokens[:4], True), Piece(3, TOKENS[2][:20], True)]
        steps.append(batch.step(pieces, rows_B))
    results = [step.read() for step in steps]
    with pytest.raises(ValueError, match="set_mask"):
        batch.step([], np.arange(ROWS) == 3)
    batch.close_row(0)
    batch.close_row(3)
    assert [r.tokens_BK[0, 0] for r in results] == tokens[4:]
    assert all(r.tokens_BK[3, 0] in ids for r, ids in zip(results, allowed, strict=False))


def test_other_weights_need_no_program_and_bad_ones_change_nothing(batch):
    weights = make_weights()
    other = weights._replace(params=weights.params | {"head_DV": weights.params["head_DV"][:, ::-1]})
    short = weights._replace(params=weights.params | {"head_DV": weights.params["head_DV"][:, :299]})
    with pytest.raises(ValueError, match=r"head_DV.* is float32\[32, 299\] where float32\[32, 300\]"):
        batch.update_weights(short)
    programs = dict(batch._calls._programs)
    batch.update_weights(other)
    mirrored = Host(batch).run([Job(PROMPTS[0], max_new_tokens=1, sampling=GREEDY)])[0].tokens
    batch.update_weights(weights)
    again = Host(batch).run([Job(PROMPTS[0], max_new_tokens=1, sampling=GREEDY)])[0].tokens
    assert [299 - token for token in mirrored] == again == alone(PROMPTS[0], 1, GREEDY)
    assert programs == batch._calls._programs


def test_a_row_whose_logits_are_not_numbers_ends_and_others_go_on(batch):
    weights, broken = make_weights(), 250
    embed_VD = weights.params["embed_VD"].at[broken].set(jnp.nan)
    batch.update_weights(weights._replace(params=weights.params | {"embed_VD": embed_VD}))
    good = next(prompt for prompt in (TOKENS[i][:9] for i in range(8)) if broken not in prompt)
    want = alone(good, 6, GREEDY)
    assert broken not in want
    jobs = [Job(prompt, max_new_tokens=6, sampling=GREEDY) for prompt in (good, [4, broken, 6], good)]
    Host(batch).run(jobs)
    batch.update_weights(weights)
    assert [job.tokens for job in jobs] == [want, [NO_TOKEN], want]


def test_a_step_leaves_pages_in_place(batch):
    """A copy of them would be an instruction with their shape."""
    shape = ",".join(map(str, batch._calls._pages.shape))
    flat = ",".join(map(str, (batch._calls._pages.shape[0] * PAGES, *batch._calls._pages.shape[2:])))
    for name, program in batch._calls._programs.items():
        found = re.findall(rf"= f32\[(?:{shape}|{flat})\]\S* copy\(.*", program.as_text())
        assert not found, (name, found)


def test_pages_are_copied_in_their_order(batch):
    """The second copy reads what the first has written; ten take two calls."""
    batch.update_weights(make_weights())
    batch.open_row(0, RowSettings(sampling=GREEDY, max_new_tokens=0))
    batch.set_table(0, [1])
    batch.step([Piece(0, [5, 6, 7], True)], np.zeros(ROWS, bool)).read()
    before = np.asarray(batch._calls._pages)
    batch.copy_pages(0, [Copy(page, page + 1) for page in range(1, 11)])
    batch.step([], np.zeros(ROWS, bool)).read()
    batch.close_row(0)
    after = np.asarray(batch._calls._pages)
    assert (
        before[:, 1, :3].any() and (after[:, 1:12] == before[:, [1]]).all() and (after[:, 12:] == before[:, 12:]).all()
    )


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda b: b.step([Piece(0, [1], True)], np.zeros(ROWS, bool)), "must be open"),
        (lambda b: b.open_row(ROWS, RowSettings(sampling=GREEDY, max_new_tokens=1)), "none of the 6 rows"),
        (lambda b: b.set_table(0, range(6)), "longer than the 5"),
        (lambda b: b.set_mask(0, np.zeros(10, np.int32)), "masked"),
        (
            lambda b: b.open_row(
                0, RowSettings(sampling=GREEDY, max_new_tokens=1, own=Request(logit_bias=dict.fromkeys(range(301), 1)))
            ),
            "logit_bias has",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(batch, act, words):
    with pytest.raises(ValueError, match=words):
        act(batch)


def test_a_batch_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        DeviceBatch(
            CONFIG, make_weights(), mesh_of(), num_rows=1, num_pages=1, num_positions=1, eos=1, most_prefill_tokens=3
        )
    with pytest.raises(ValueError, match="pages would fit"):
        DeviceBatch(CONFIG, make_weights(), mesh_of(), num_rows=1, num_pages=10**9, num_positions=1, eos=1)


@pytest.mark.slow
def test_rows_of_two_devices_get_what_each_gets_alone():
    """The devices share the experts; each has rows and pages of its own, and the same page numbers."""
    batch = make_batch(mesh=generate.expert_mesh(CONFIG.model, 2))
    assert (batch.num_devices, batch.num_rows, batch.device_of(2), batch.device_of(3)) == (2, 6, 0, 1)
    samplings = [GREEDY, WARM, GREEDY, GREEDY, WARM, GREEDY]
    jobs = Host(batch).run(jobs_of(samplings), most_running=4)
    for i, job in enumerate(jobs):
        assert job.tokens == alone(PROMPTS[i], LENGTHS[i], samplings[i], number=i), i
    assert {batch.device_of(job.row) for job in jobs} == {0, 1}
    batch.copy_pages(4, [Copy(1, 2), Copy(2, 3)])
    batch.open_row(4, RowSettings(sampling=GREEDY, max_new_tokens=0))
    batch.set_table(4, [0])
    piece = Piece(4, TOKENS[6][:40], True, True)
    before = np.asarray(batch._calls._pages)
    found = batch.step([piece], np.zeros(6, bool)).read().prompt_logprobs[4]
    after = np.asarray(batch._calls._pages)
    assert (after[:, [PAGES + 2, PAGES + 3]] == before[:, [PAGES + 1]]).all()
    assert (after[:, :PAGES] == before[:, :PAGES]).all() and (after[:, PAGES] != before[:, PAGES]).any()
    logits_SV = expanded_logits(CONFIG, make_weights(), np.array([piece.ids + [0] * 24]))[0]
    log_SV = np.asarray(jax.nn.log_softmax(logits_SV.astype(jnp.float32)))
    np.testing.assert_allclose(found.chosen_B, log_SV[np.arange(39), piece.ids[1:]], atol=1e-5)
