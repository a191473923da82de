"""Rows that draft get what they get without drafts: tokens, ends, log-probabilities, and pages that others find."""

import dataclasses
import functools
from array import array

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference import job as job_lib
from deepseek_jax.inference.acceptance import expected_tokens, worth_rows
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.counters import Counters
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import expert_mesh, known_ids
from deepseek_jax.inference.page_pool import PagePool
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.row_state import RowSettings
from deepseek_jax.inference.sampling import NO_TOKEN, Sampling
from deepseek_jax.inference.step import Piece
from deepseek_jax.serving.grammar import Grammars
from tests.inference.test_batch import BUDGET, PAGES, POSITIONS, SEED, Host, Job
from tests.inference.test_drafter import CONFIG, MESH
from tests.inference.test_engine_model import Smaller, check_pages_are_back, texts_of
from tests.support.drawn import drawn_weights

pytestmark = pytest.mark.xdist_group("speculative")  # what is compiled once, serves all tests

ROWS = 4
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
TOLD = Sampling(temperature=0.0, top_k=0, top_p=1.0, num_logprobs=3)
WARM = Sampling(temperature=0.8, top_k=20, top_p=0.9)
HOT = Sampling(temperature=0.8, top_k=0, top_p=1.0, num_logprobs=0)
PENALIZED = Sampling(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.3, frequency_penalty=0.2)
TOKENIZER = byte_tokenizer()
TOKENS = np.random.default_rng(5).integers(6, 262, (8, 300)).tolist()


@functools.cache
def weights():
    """Drawn, with small layers: the next token follows from the last one mostly, so the MTP layer is often right."""
    drawn = drawn_weights(CONFIG.model)

    def small(path, leaf):
        name = path[-1].key
        if name == "merge_2DD":
            identity_DD = jnp.eye(CONFIG.model.width)
            return jnp.stack([identity_DD, 0.05 * identity_DD])[None] + 0.02 * leaf
        return 0.012 * leaf if name in ("o_NHD", "down_FD", "down_EFD") else leaf

    return drawn._replace(params=jax.tree.map_with_path(small, drawn.params))


@functools.cache
def batch_of(num_drafts, drafting_rows=None, burst=None):
    sizes = {"num_rows": ROWS, "num_pages": PAGES, "num_positions": POSITIONS, "most_prefill_tokens": BUDGET}
    drafts = {"num_drafts": num_drafts, "drafting_rows": drafting_rows, "burst": burst}
    return DeviceBatch(CONFIG, known_ids(weights(), TOKENIZER), MESH, eos=TOKENIZER.eos, **sizes, **drafts)


class DraftingHost(Host):
    """A host that says what follows its pieces, and lets others find what its jobs have written."""

    def __init__(self, batch, ahead=2):
        super().__init__(batch, ahead)
        self.pools = [PagePool(batch.num_pages, min(batch.num_drafts, 1))]
        self.drafted = self.accepted = 0
        self.told = []  # of each row and step: tokens, whether it has ended, drafts verified and accepted

    def pieces(self, running):
        ends = {job.row: job for job in running}
        pieces = super().pieces(running)
        following = [ends[piece.row].prompt[ends[piece.row].done :] for piece in pieces]
        return [Piece(*piece[:4], ids[0] if ids else None) for piece, ids in zip(pieces, following, strict=True)]

    def read(self):
        step, running = self.flying[0]
        super().read()
        result = step.read()
        for job in running:
            count = int(result.counts_B[job.row])
            if result.logprobs is not None:
                job.logprobs = getattr(job, "logprobs", []) + [leaf[job.row, :count] for leaf in result.logprobs[:1]]
            if result.drafts_BN2 is not None and count:
                drafted, accepted = result.drafts_BN2[job.row].sum(axis=0).tolist()
                self.drafted += drafted
                self.accepted += accepted
                self.told.append((count, bool(result.finished_B[job.row]), drafted, accepted))
            ids = job.prompt + job.tokens
            if job.tokens and job.sequence._is_open and job.sequence.completes(len(ids) - 1):
                job.sequence.commit(ids[len(job.sequence) : len(ids) - 1])
                table = np.zeros(job.sequence.num_pages, np.int32)
                job.sequence.fill(table)
                self.batch.set_table(job.row, table)


def jobs():
    """Every kind of row but drawn ones; prompts with a common prefix, of whole pages, of one token."""
    shared = TOKENS[7][:140]
    prompts = [TOKENS[0][:5], TOKENS[1][:230], shared, TOKENS[3][:64], shared[:130] + TOKENS[4][:9], TOKENS[5][:1]]
    settings = [(GREEDY, 40), (PENALIZED, 7), (TOLD, 30), (GREEDY, 2), (GREEDY, 66), (TOLD, 33)]
    made = [
        Job(prompt, sampling=sampling, max_new_tokens=most, seed=SEED, number=i, ignore_eos=True)
        for i, (prompt, (sampling, most)) in enumerate(zip(prompts, settings, strict=True))
    ]
    made[3].settings["own"] = Request(logit_bias={7: 3.0, 8: 2.0})
    return made


@functools.cache
def plain():
    return DraftingHost(batch_of(0)).run(jobs())


@pytest.mark.parametrize("num_drafts", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_greedy_rows_get_the_text_of_plain_decoding(num_drafts):
    """In turns, in three rows, two steps ahead; log-probabilities are the same up to the last token."""
    host = DraftingHost(batch_of(num_drafts))
    for got, want in zip(host.run(jobs()), plain(), strict=True):
        assert got.tokens == want.tokens and len(got.tokens) == got.settings["max_new_tokens"]
        assert got.cached == want.cached
        if got.settings["sampling"] is TOLD:
            a, b = np.concatenate(got.logprobs), np.concatenate(want.logprobs)
            np.testing.assert_allclose(a[: len(got.tokens)], b[: len(got.tokens)], atol=1e-5)
    assert 0.3 < host.accepted / host.drafted < 0.95


def run(batch, *made, **options):
    host = DraftingHost(batch)
    host.run(made, **options)
    return host


def job(prompt, most, sampling=GREEDY, **settings):
    return Job(prompt, sampling=sampling, max_new_tokens=most, seed=SEED, number=0, ignore_eos=True, **settings)


def test_a_row_ends_at_its_last_token_and_at_an_end_inside_of_a_draft():
    """Whatever is drafted behind: for every length, and for every token as the end."""
    prompt, whole = TOKENS[0][:5], plain()[0].tokens[:12]
    ends = [i for i in range(12) if whole[i] not in whole[:i]]
    made = [job(prompt, most) for most in range(1, 13)]
    made += [job(prompt, 40, end_ids=[whole[end]]) for end in ends]
    host = run(batch_of(3), *made, most_running=ROWS)
    assert [one.tokens for one in made] == [whole[:n] for n in range(1, 13)] + [whole[: end + 1] for end in ends]
    assert all(one.finished for one in made) and len(ends) > 5
    assert all(accepted in (count - 1, count) and accepted <= drafted for count, _, drafted, accepted in host.told)
    last = [(count, drafted, accepted) for count, ended, drafted, accepted in host.told if ended]
    assert all(drafted <= count for count, drafted, _ in last)
    assert sum(accepted == count for count, _, accepted in last) > 2  # the end was a draft, and counts as one


@pytest.mark.slow
def test_a_draw_does_not_depend_on_neighbours_or_on_the_row():
    alone, beside = job(TOKENS[2][:20], 30, WARM), job(TOKENS[2][:20], 30, WARM)
    host = run(batch_of(3), alone)
    assert 0.1 < host.accepted / host.drafted < 0.9
    run(batch_of(3), job(TOKENS[1][:70], 35, WARM), job(TOKENS[3][:9], 5, PENALIZED), beside)
    assert alone.tokens == beside.tokens and len(set(alone.tokens)) > 5


@pytest.mark.parametrize("sampling", [GREEDY, pytest.param(WARM, marks=pytest.mark.slow)])
def test_a_masked_row_drafts_one_token_and_gets_what_it_gets_without_drafts(sampling):
    """The mask of each token depends on where it stands; beside a row that drafts three."""
    found, rows_B, accepted = [], np.array([True, True, False, False]), 0
    keep_PX = np.random.default_rng(3).random((30, 288)) < 0.8
    words_PW = np.packbits(keep_PX, axis=1, bitorder="little").view("<i4")
    for batch in (batch_of(0), batch_of(3)):
        batch.open_row(0, RowSettings(sampling=sampling, seed=SEED, max_new_tokens=20, masked=True, ignore_eos=True))
        batch.open_row(1, RowSettings(sampling=GREEDY, max_new_tokens=60, ignore_eos=True))
        batch.set_table(0, [3])
        batch.set_table(1, [4])
        ids, guess = [], NO_TOKEN
        while len(ids) < 20:
            draft = guess if guess != NO_TOKEN and keep_PX[len(ids), guess] else NO_TOKEN
            batch.set_mask(0, words_PW[len(ids)], draft, words_PW[len(ids) + 1])
            pieces = [] if ids else [Piece(0, TOKENS[4][:20], True), Piece(1, TOKENS[0][:5], True)]
            step = batch.step(pieces, rows_B & bool(ids)).read()
            if ids and batch.num_drafts:
                ((drafted, stood),) = step.drafts_BN2[0]
                assert drafted == (draft != NO_TOKEN and len(ids) < 19) and stood == step.counts_B[0] - 1
                accepted += stood
                assert (step.guess_B[0] == NO_TOKEN) == step.finished_B[0] and (step.guess_B[1:] == NO_TOKEN).all()
            ids += step.tokens_BK[0, : step.counts_B[0]].tolist()
            guess = int(step.guess_B[0])
        found.append(ids)
        batch.close_row(0)
        batch.close_row(1)
    assert found[0] == found[1] and accepted > 3
    assert all(keep_PX[place, token] for place, token in enumerate(ids))


def test_a_prefix_whose_end_was_drafted_is_found_as_it_is_computed():
    """Drafts are rejected at a page's end; then a prompt finds that page, with the entries of a fresh cache."""
    batch = batch_of(3)
    first = job(TOKENS[3][:61], 30)
    host = run(batch, first)
    assert host.accepted < host.drafted
    longer = [job(TOKENS[3][:61] + first.tokens[:n], 20) for n in (3, 4, 29)]
    other = job(TOKENS[3][:61] + first.tokens[:3] + [(first.tokens[3] + 1) % 262, 5], 20)
    host.run([*longer, other])
    assert [one.cached for one in [*longer, other]] == [0, 64, 64, 0]  # the last one's next token is another
    got = entries(host, longer[2].prompt)
    for one in [*longer, other]:
        fresh = job(one.prompt, 20)
        alone = run(batch, fresh)
        assert fresh.tokens == one.tokens and fresh.cached == 0
        if one is longer[2]:
            want = entries(alone, one.prompt)
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def entries(host, prompt):
    """What the first page of a prompt has in all layers, the MTP layer's too."""
    (page,) = host.pools[0].find(array("i", prompt[:65]), None)
    return np.asarray(host.batch._calls._pages)[:, page].copy()


@pytest.mark.parametrize("sampling", [GREEDY, pytest.param(HOT, marks=pytest.mark.slow)], ids=["greedy", "drawn"])
def test_a_burst_tells_what_single_steps_tell(sampling):
    """Tokens in one line, log-probabilities, experts, drafts and ends; a row ends within a burst."""
    batch, rows_B, found = batch_of(3, burst=3), np.arange(ROWS) < 2, []
    for plan in ([1] * 15, [3] * 5):
        told = [[[], [], [], []] for _ in range(2)]
        for row, most in ((0, 60), (1, 15)):
            settings = {"sampling": sampling, "max_new_tokens": most, "seed": SEED, "number": row, "routes": True}
            batch.open_row(row, RowSettings(**settings, ignore_eos=True))
            batch.set_table(row, [4 * row, 4 * row + 1])
        batch.step([Piece(row, TOKENS[row][: 5 + row], True) for row in (0, 1)], rows_B & False).read()
        for step in [batch.step([], rows_B, num_tokens) for num_tokens in plan]:
            result = step.read()
            for row, (ids, logprobs, routes, drafts) in enumerate(told):
                count = result.counts_B[row]
                ids += result.tokens_BK[row, :count].tolist()
                logprobs += [] if result.logprobs is None else result.logprobs.chosen_B[row, :count].tolist()
                routes += result.routes[row].tolist()
                drafts += result.drafts_BN2[row].tolist()
        assert result.finished_B.tolist()[:2] == [False, True] and result.tokens_BK.shape[1] == 4 * plan[0]
        for row in (0, 1):
            batch.close_row(row)
        found.append(told)
    for (single, logprobs, *rest), (burst, others, *more) in zip(*found, strict=True):
        assert single == burst and rest == more and len(rest[0]) == len(burst) >= 14
        assert len(logprobs) == (0 if sampling is GREEDY else len(burst))
        np.testing.assert_allclose(others, logprobs, atol=1e-5)
        drafted, accepted = np.sum(more[1], axis=0)
        assert 0 < accepted < drafted


@pytest.mark.slow  # one more program
def test_nothing_is_drafted_while_more_rows_decode_than_it_is_for():
    """The MTP layer follows, so that drafts are as good afterwards."""
    host = DraftingHost(batch_of(3, drafting_rows=1))
    made = [job(TOKENS[0][:5], 40), job(TOKENS[1][:30], 12)]
    host.run(made)
    assert made[0].tokens == plain()[0].tokens
    assert host.accepted / host.drafted > 0.3 and host.drafted < 80


@pytest.mark.slow
def test_rows_of_two_devices_draft_as_those_of_one():
    """The devices share the experts of the main model and of the MTP layer."""
    mesh, sizes = expert_mesh(CONFIG.model, 2), {"num_rows": ROWS, "num_pages": PAGES, "num_positions": POSITIONS}
    drafts = {"most_prefill_tokens": BUDGET, "num_drafts": 2}
    batch = DeviceBatch(CONFIG, known_ids(weights(), TOKENIZER), mesh, eos=TOKENIZER.eos, **sizes, **drafts)
    host = DraftingHost(batch)
    host.pools = [PagePool(PAGES, 1) for _ in range(batch.num_devices)]
    for got, want in zip(host.run(jobs(), most_running=ROWS), plain(), strict=True):
        assert got.tokens == want.tokens
    assert 0.3 < host.accepted / host.drafted < 0.95


class OddThenAny:
    """A grammar: ids are odd in turns, and any between."""

    def __init__(self):
        self.num = 0

    def fill(self, words_W):
        words_W[:] = -1 if self.num % 2 else -0x55555556

    def accept(self, token):
        assert token % 2 or self.num % 2
        self.num += 1

    def rollback(self, count):
        self.num -= count


def test_an_engine_that_drafts_gives_the_same_answers():
    """Greedy, stop strings, grammars, prefixes, more jobs than rows, and a cache so small that jobs are preempted."""
    rng = np.random.default_rng(2)
    jobs = [job_lib.Job(prompt=TOKENS[i][:5], max_new_tokens=150, sampling=GREEDY, ignore_eos=True) for i in (3, 4, 5)]
    for i in range(16):
        prompt = TOKENS[i % 3][: rng.integers(1, 130)]
        more = {"grammar": OddThenAny} if i % 5 == 0 else {"stop": [chr(65 + i), 70 + i]} if i % 5 == 1 else {}
        sampling, most = TOLD if i % 4 == 0 else GREEDY, int(rng.integers(1, 60))
        jobs.append(job_lib.Job(prompt=prompt, max_new_tokens=most, sampling=sampling, **more))
    with Engine(batch_of(0), TOKENIZER) as engine:
        answers = engine.generate(jobs)
        drawn = [dataclasses.replace(one, sampling=WARM, own=Request(seed=4), stop=()) for one in jobs[3:9]]
        drawn_texts = texts_of(engine.generate(drawn))
    with Engine(batch_of(3), TOKENIZER) as engine:
        found = engine.generate(jobs)
        assert texts_of(found) == texts_of(answers)
        assert texts_of(engine.generate(drawn)) == drawn_texts == texts_of(engine.generate(drawn[::-1]))[::-1]
        constrained = [one for one, job in zip(found, jobs, strict=True) if job.grammar]
        assert sum(one.usage.drafted_tokens for one in constrained) > 20
        assert sum(one.usage.accepted_tokens for one in constrained) > 5
        check_pages_are_back(engine)
        drafted, accepted = np.array(engine.stats().drafted), np.array(engine.stats().accepted)
    assert (drafted >= accepted).all() and (accepted > 0).all() and (np.diff(accepted) < 0).all()
    for got, want in zip(found, answers, strict=True):
        assert got.usage.accepted_tokens <= got.usage.drafted_tokens
        if want.logprobs:
            np.testing.assert_allclose(*([one.logprob for one in x.logprobs] for x in (got, want)), atol=1e-5)
    with Engine(Smaller(batch_of(3), 5), TOKENIZER) as engine:
        assert texts_of(engine.generate(jobs)) == texts_of(answers)
        assert engine.stats().preemptions > 0
        check_pages_are_back(engine)


def test_a_schema_gives_the_same_json_with_drafts():
    """Greedy and drawn, with top-p too: the parser takes back what was a guess alone."""
    schema = {"type": "array", "items": {"type": "string", "minLength": 20, "maxLength": 25}, "minItems": 2}
    make = Grammars(TOKENIZER, TOKENIZER.vocab_size).schema(schema, "schema")
    settings = {"max_new_tokens": 90, "grammar": make}
    jobs = [
        job_lib.Job(prompt=TOKENS[i][:9], sampling=sampling, own=Request(seed=i), **settings)
        for i, sampling in enumerate((GREEDY, Sampling(temperature=0.7, top_k=0, top_p=1.0), WARM))
    ]
    with Engine(batch_of(0), TOKENIZER) as engine:
        want = engine.generate(jobs)
    with Engine(batch_of(3), TOKENIZER) as engine:
        found = engine.generate(jobs)
    assert texts_of(found) == texts_of(want) and all(answer.text.startswith("[") for answer in found)
    assert all(answer.usage.accepted_tokens > 2 for answer in found)


def test_where_drafting_is_worth_its_time():
    """(1 + a) / (1 + c) of DeepSeek-V3's 85% and of less."""
    assert expected_tokens([0.85]) == 1.85 and expected_tokens([0.5, 0.25, 0.125]) == 1.875
    costs = {1: 0.05, 32: 0.1, 128: 0.6, 256: 0.9}
    assert [worth_rows([a], costs) for a in (0.85, 0.3, 0.01)] == [128, 32, 0]


def test_the_counted_shares_give_the_tokens_of_a_step():
    """Three drafts a step, each right 85% of the time if those before it are."""
    counters, rng = Counters(3), np.random.default_rng(0)
    accepted = np.cumprod(rng.random((1000, 3)) < 0.85, axis=1).sum(axis=1).tolist()
    for number in accepted:
        counters.draft(3, number)
    shares = np.divide(counters.accepted, counters.drafted)
    assert expected_tokens(shares) == pytest.approx(1 + np.mean(accepted))
    assert worth_rows(shares, {1: np.mean(accepted) - 0.01, 32: np.mean(accepted) + 0.01}) == 1


@pytest.mark.parametrize(("num_drafts", "words"), [(4, "must be from 0 to 3"), (-1, "must be from 0 to 3")])
def test_more_drafts_than_a_step_verifies_are_refused(num_drafts, words):
    with pytest.raises(ValueError, match=words):
        batch_of(num_drafts)
