"""The engine over a device without a model, whose tokens tell what it has read (`tests/support/fake_batch.py`)."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference import engine as engine_module
from deepseek_jax.inference import scheduler
from deepseek_jax.inference.answers import join
from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import ClosedError, Job, QueueFullError
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.parameters import Weights
from tests.support.fake_batch import VERSION, FakeBatch, fake_weights, logprob, text_ids
from tests.support.patience import SECONDS, wait_for

TOKENIZER = byte_tokenizer()
DRAWN = Sampling(temperature=1.0, top_k=0, top_p=1.0)


class Heard(list):
    """The deltas of a job."""

    def __init__(self):
        super().__init__()
        self.has_ended = threading.Event()

    def __call__(self, delta):
        self.append(delta)
        if delta.finish_reason is not None:
            self.has_ended.set()

    def answer(self):
        assert self.has_ended.wait(SECONDS), "a last delta"
        assert [delta.finish_reason for delta in self].count(None) == len(self) - 1, "and only one"
        return join(self)


def want_ids(batch, job, version=0):
    ends = set() if job.ignore_eos else {TOKENIZER.eos}
    salt = job.own.seed if job.sampling.temperature else 0
    return text_ids(job.prompt, job.max_new_tokens, batch.vocab_size, ends, version, salt)


def random_jobs(count, seed=0, longest=400, **options):
    """Jobs of all kinds; a third of them share the beginning of their prompts."""
    rng = np.random.default_rng(seed)
    shared, jobs = rng.integers(0, 250, 300).tolist(), []
    for i in range(count):
        prompt = rng.integers(0, 250, rng.integers(1, longest)).tolist()
        if i % 3 == 0:
            prompt = shared[: rng.integers(1, 300)] + prompt[: longest // 4]
        sampling = DRAWN if i % 4 == 1 else GREEDY
        own = Request(seed=int(rng.integers(100)), num_logprobs=2 if i % 5 == 0 else None)
        fields = {
            "ignore_eos": bool(i % 2),
            "priority": int(rng.integers(3)),
            "own": own,
            "sampling": sampling,
        } | options
        jobs.append(Job(prompt=prompt, max_new_tokens=int(rng.integers(1, 150)), **fields | options))
    return jobs


def check_pages_are_back(engine):
    """A row is given back behind the last delta, so a listener may look before."""
    wait_for(lambda: not (engine.stats().waiting or engine.stats().running or engine.stats().pages_used))


def long_job(num_tokens=100_000, **options):
    return Job(**{"prompt": [3, 4, 5], "max_new_tokens": num_tokens, "sampling": GREEDY, "ignore_eos": True} | options)


def endless_batch(**options):
    """A device on which `long_job` does not end while a test runs."""
    options = {"num_positions": 200_000, "num_pages": 4000} | options
    return FakeBatch(before=lambda: time.sleep(0.0005), **options)


class HeldBatch(FakeBatch):
    """A device that stands still in a step, the tenth that it is asked for by default, until `ask` has asked."""

    def __init__(self, held_at=10, **options):
        super().__init__(before=self._hold, **options)
        self.is_held, self.goes_on, self._steps, self._held_at = threading.Event(), threading.Event(), 0, held_at

    def _hold(self):
        self._steps += 1
        if self._steps == self._held_at:
            self.is_held.set()
            assert self.goes_on.wait(SECONDS)

    def ask(self, engine, request, *arguments, **options):
        """Let `request` reach the engine while the step stands still, and return what it returns."""
        assert self.is_held.wait(SECONDS)
        with ThreadPoolExecutor(1) as caller:
            asked = caller.submit(request, *arguments, **options)
            wait_for(lambda: engine._inbox._requests)
            self.goes_on.set()
            return asked.result(SECONDS)


@pytest.mark.parametrize(
    ("num_pages", "num_drafts", "num_devices", "burst", "bulk"),
    [(400, 0, 1, 1, 0), (400, 2, 1, 1, 0), (10, 0, 1, 1, 0), (10, 3, 1, 1, 0), (10, 1, 2, 1, 0), (400, 0, 1, 4, 0)]
    + [(10, 3, 2, 3, 0), (10, 0, 2, 3, 0), (400, 0, 1, 4, 1), (10, 3, 2, 3, 1)],
)
def test_every_job_is_as_alone(num_pages, num_drafts, num_devices, burst, bulk, monkeypatch):
    """With room for all and in a cache that fits one job, where jobs give way; drafts, devices, bursts, bulk."""
    monkeypatch.setattr(scheduler, "IDLE_PART", 4)  # of eight rows two, or one of a device's four
    sizes = {"num_drafts": num_drafts, "num_devices": num_devices, "burst": burst, "burst_rows": 8, "bulk": bool(bulk)}
    batch = FakeBatch(num_rows=8, num_pages=num_pages, **sizes)
    jobs = [*random_jobs(80), *(long_job(300, prompt=[i] * 5, sampling=GREEDY) for i in range(9))]
    with Engine(batch, TOKENIZER) as engine:
        for job, answer in zip(jobs, engine.generate(jobs), strict=True):
            want = want_ids(batch, job)
            assert answer.ids == want
            assert answer.text == TOKENIZER.decode(want)
            assert answer.finish_reason == ("length" if len(want) == job.max_new_tokens else "stop")
            assert answer.usage[:3] == (len(job.prompt), answer.usage.cached_tokens, len(want))
            if job.own.num_logprobs is not None:
                entries = [*job.prompt, *want]
                value = [logprob(entries[: len(job.prompt) + i], token) for i, token in enumerate(want)]
                np.testing.assert_allclose([entry.logprob for entry in answer.logprobs], value, rtol=1e-6)
                assert all(entry.token == token for entry, token in zip(answer.logprobs, want, strict=True))
                assert all(len(entry.top) == 2 for entry in answer.logprobs)
            else:
                assert answer.logprobs is None
        check_pages_are_back(engine)
        stats = engine.stats()
        assert stats.cached_tokens > 0 and stats.prompt_tokens == sum(len(job.prompt) for job in jobs)
        assert (stats.preemptions > 0) == (num_pages == 10)
        assert (sum(stats.drafted) > sum(stats.accepted) > 0) == (num_drafts > 0)
        assert (batch.num_bursts > 0) == (burst > 1)
        assert stats.completion_tokens == sum(len(want_ids(batch, job)) for job in jobs)


def test_nobody_is_lost_or_mixed_up():
    """Three threads submit; some jobs are cancelled whenever, some have a deadline, some are refused at the door."""
    batch = FakeBatch(num_rows=6, num_pages=16, before=lambda: time.sleep(0.0003))
    jobs, heard, refused = random_jobs(200, seed=1), {}, []
    rng = np.random.default_rng(2)
    kinds = rng.integers(0, 5, len(jobs)).tolist()
    waits = rng.uniform(0, 0.3, len(jobs)).tolist()

    def submit(engine, start):
        for i in range(start, len(jobs), 3):
            job = jobs[i]
            if kinds[i] == 0:
                job = Job(prompt=job.prompt * 40, max_new_tokens=3, sampling=GREEDY)
            if kinds[i] == 1:
                job = Job(prompt=job.prompt, max_new_tokens=9, sampling=GREEDY, deadline=time.monotonic() + waits[i])
            listener = Heard()
            try:
                ticket = engine.submit(job, listener)
            except ValueError:
                refused.append(i)
                continue
            heard[i] = job, listener
            if kinds[i] == 2:
                threading.Timer(waits[i], ticket.cancel).start()

    with Engine(batch, TOKENIZER) as engine:
        threads = [threading.Thread(target=submit, args=(engine, start)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(heard) + len(refused) == len(jobs) and refused
        reasons = set()
        for job, listener in heard.values():
            answer, want = listener.answer(), want_ids(batch, job)
            reasons.add(answer.finish_reason)
            if answer.finish_reason in ("cancelled", "deadline"):
                assert answer.ids == want[: len(answer.ids)]
                assert answer.text == TOKENIZER.decode(answer.ids)
            else:
                assert answer.ids == want
        assert {"cancelled", "deadline", "length"} <= reasons
        check_pages_are_back(engine)
        assert sum(engine.stats().finished.values()) == len(heard)


def test_the_order_of_jobs_changes_nothing():
    jobs = random_jobs(30, seed=3)
    with Engine(FakeBatch(num_pages=12), TOKENIZER) as engine:
        forth = engine.generate(jobs)
        back = engine.generate(jobs[::-1])[::-1]
    assert [(answer.text, answer.ids) for answer in forth] == [(answer.text, answer.ids) for answer in back]


def test_priorities_go_first(monkeypatch):
    now = time.monotonic()  # of all four: later ones catch up
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: now))
    order, jobs = [], [long_job(3, priority=priority) for priority in (0, 1, 0, 2)]
    engine = Engine(FakeBatch(num_rows=1), TOKENIZER)
    engine.pause()
    for i, job in enumerate(jobs):
        engine.submit(job, lambda delta, i=i: order.append(i) if delta.finish_reason else None)
    engine.resume()
    wait_for(lambda: len(order) == 4)
    engine.close()
    assert order == [3, 1, 0, 2]


def test_the_next_step_is_dispatched_before_the_last_is_read():
    events = []

    class Step:
        def __init__(self, number, step):
            self.number, self.step = number, step

        def read(self):
            events.append(("read", self.number))
            return self.step.read()

    class Batch(FakeBatch):
        def step(self, *args):
            events.append(("dispatch", len(self.log)))
            return Step(len(self.log), super().step(*args))

    with Engine(Batch(), TOKENIZER) as engine:
        engine.generate([long_job(5)])
    assert events[:6] == [("dispatch", 0), ("dispatch", 1), ("read", 0), ("dispatch", 2), ("read", 1), ("dispatch", 3)]
    assert len(events) == 10, "and nothing behind the end"


def test_a_long_prompt_does_not_stop_those_that_run():
    batch = endless_batch()
    with Engine(batch, TOKENIZER, prefill_beside=32) as engine:
        heard = Heard()
        ticket = engine.submit(long_job(), heard)
        wait_for(lambda: heard)
        engine.generate([Job(prompt=[9] * 640, max_new_tokens=2, sampling=GREEDY)])
        ticket.cancel()
    beside = [step for step in batch.log if step[0] > 3]
    assert beside == [(32, 1)] * 20


@pytest.mark.parametrize("with_grammar", [False, True])
def test_stop_strings_and_ids(with_grammar):
    """A text ends before a stop string, which its ids have, and before a stop id, which they lack."""

    class Anything:
        def __init__(self):
            self.accepted = []
            grammars.append(self)

        def fill(self, words_W):
            words_W[:] = -1

        def accept(self, token):
            self.accepted.append(token)

    grammars, batch = [], FakeBatch()
    plain = long_job(60)
    options = {"grammar": Anything} if with_grammar else {}
    with Engine(batch, TOKENIZER) as engine:
        whole = engine.generate([plain])[0]
        stop = whole.text[4:6]
        end = next(i for i, token in enumerate(whole.ids) if i > 3 and token not in whole.ids[:i])
        cut, by_id = engine.generate([long_job(60, stop=[stop]), long_job(60, stop=[whole.ids[end]], **options)])
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.usage.completion_tokens == len(cut.ids) and TOKENIZER.decode(cut.ids).endswith(stop)
    if not with_grammar:
        assert (by_id.ids, by_id.finish_reason) == (whole.ids[:end], "stop")
    else:
        assert grammars[0].accepted == by_id.ids


class Even:
    """Only even ids, and `length` of them."""

    def __init__(self, length=10**9):
        self.left = length

    def fill(self, words_W):
        words_W[:] = 0x55555555
        words_W[-1] = 0

    def accept(self, token):
        if not self.left:
            raise RuntimeError("too complex")
        self.left -= 1
        assert token % 2 == 0

    def rollback(self, count):
        self.left += count


class Counted(Even):
    """Even ids; no token is that of the turn before the last."""

    def __init__(self):
        super().__init__()
        self.ids = []

    def fill(self, words_W):
        super().fill(words_W)
        for token in self.ids[-2:-1]:
            words_W[token // 32] &= ~(1 << token % 32)

    def accept(self, token):
        assert token not in self.ids[-2:-1]
        self.ids.append(token)

    def rollback(self, count):
        del self.ids[-count:]


def test_a_grammar_holds_beside_rows_without_one_and_one_that_breaks_ends_its_job_alone():
    batch = FakeBatch(num_pages=6)
    broken = long_job(20, grammar=lambda: Even(5))
    jobs = [long_job(40), long_job(40, grammar=Even, prompt=[6]), long_job(40, prompt=[7]), broken]
    with Engine(batch, TOKENIZER) as engine:
        answers = engine.generate(jobs)
        with pytest.raises(ValueError, match="no such schema"):
            engine.submit(long_job(5, grammar=lambda: (_ for _ in ()).throw(ValueError("no such schema"))), Heard())
    assert answers[0].ids == want_ids(batch, jobs[0]) and answers[2].ids == want_ids(batch, jobs[2])
    assert len(answers[1].ids) == 40 and not any(token % 2 for token in answers[1].ids)
    assert (answers[3].finish_reason, answers[3].error) == ("error", "too complex")


@pytest.mark.parametrize("num_pages", [64, 5])
def test_a_grammar_gives_the_same_text_with_drafts(num_pages):
    """Of which some may not come, and some are right; a job that gives way keeps its grammar where it is."""
    jobs = [long_job(100 + i, grammar=Counted, prompt=[i] * 9) for i in range(6)] + [long_job(90, prompt=[7])]
    found = []
    for num_drafts in (0, 2):
        with Engine(FakeBatch(num_pages=num_pages, num_drafts=num_drafts), TOKENIZER) as engine:
            found.append(engine.generate(jobs))
            assert (engine.stats().preemptions > 0) == (num_pages == 5)
            check_pages_are_back(engine)
    for plain, drafted in zip(*found, strict=True):
        assert drafted.ids == plain.ids
    for answer in found[1][:6]:
        assert 0 < answer.usage.accepted_tokens < answer.usage.drafted_tokens < len(answer.ids)


@pytest.mark.parametrize("num_pages", [100, 9])
def test_log_probabilities_of_prompts(num_pages):
    """Also of prompts that are in the cache, and in a cache that is too small for all."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 250, length).tolist() for length in (1, 2, 64, 65, 300, 500)]
    prompts += prompts
    with Engine(FakeBatch(num_pages=num_pages), TOKENIZER) as engine:
        engine.generate([Job(prompt=prompts[4], max_new_tokens=2, sampling=GREEDY)])
        found = engine.log_probabilities(prompts, num_top=1)
        both = engine.generate([Job(prompt=prompts[3], max_new_tokens=3, sampling=GREEDY, prompt_logprobs=0)])[0]
        check_pages_are_back(engine)
    for prompt, entries in zip(prompts, found, strict=True):
        assert [entry.token for entry in entries] == prompt[1:] and all(len(entry.top) == 1 for entry in entries)
        value = [logprob(prompt[:i], prompt[i]) for i in range(1, len(prompt))]
        np.testing.assert_allclose([entry.logprob for entry in entries], value, rtol=1e-5)
    assert both.prompt_logprobs[0] is None and len(both.prompt_logprobs) == 65 and len(both.ids) == 3


def test_a_prefix_is_found_again_and_counted():
    batch = FakeBatch()
    first, second = (Job(prompt=[*range(200), i], max_new_tokens=5, sampling=GREEDY) for i in (1, 2))
    with Engine(batch, TOKENIZER) as engine:
        answers = [engine.generate([job])[0] for job in (first, second, first)]
        salted = engine.generate([Job(prompt=first.prompt, max_new_tokens=5, sampling=GREEDY, salt="other")])[0]
    assert [answer.usage.cached_tokens for answer in (*answers, salted)] == [0, 192, 192, 0]
    assert [answer.ids for answer in answers] == [want_ids(batch, job) for job in (first, second, first)]
    assert salted.ids == answers[0].ids


def test_new_weights_wait_for_those_that_run():
    """No answer mixes versions; the next job with an old prefix has the new weights."""
    batch = HeldBatch(30, num_rows=2)
    prompt = list(range(130))
    jobs = [long_job(200 + i, prompt=[*prompt, i]) for i in range(6)]
    heard = [Heard() for _ in jobs]
    with Engine(batch, TOKENIZER) as engine:
        engine.pause()
        for job, listener in zip(jobs, heard, strict=True):
            engine.submit(job, listener)
        engine.resume()
        batch.ask(engine, engine.update_weights, fake_weights(5), version=5)
        assert len(heard[0]) >= 20
        after = engine.generate([jobs[0]])[0]
        assert engine.stats().version == 5
    answers = [listener.answer() for listener in heard]
    assert [set(answer.versions) for answer in answers] == [{0}, {0}, {5}, {5}, {5}, {5}]
    for job, answer in zip([*jobs, jobs[0]], [*answers, after], strict=True):
        assert answer.ids == want_ids(batch, job, answer.versions[0])


@pytest.mark.parametrize("running", ["keep", "recompute", "abort"])
def test_new_weights_at_once(running):
    batch, heard, job = HeldBatch(30), Heard(), long_job(400, prompt=list(range(70)))
    with Engine(batch, TOKENIZER) as engine:
        engine.submit(job, heard)
        batch.ask(engine, engine.update_weights, fake_weights(1), running=running)
        answer = heard.answer()
        assert engine.stats().version == 1
        with pytest.raises(ValueError, match="do not fit"):
            engine.update_weights(fake_weights(None))
        with pytest.raises(ValueError, match="'sometimes'"):
            engine.update_weights(fake_weights(1), running="sometimes")
        with pytest.raises(ValueError, match="of type NoneType; give .*Weights"):
            engine.update_weights(None)
        for params, bias in ((None, {}), ({}, {}), ({"head_DV": None}, {}), (fake_weights(1).params, None)):
            with pytest.raises(ValueError, match="no matrix head_DV"):
                engine.update_weights(Weights(params, bias))
        assert engine.generate([job])[0].versions == [1] * 400
    num_old = answer.versions.count(0)
    assert answer.ids[:num_old] == want_ids(batch, job)[:num_old] and num_old >= 20
    if running == "abort":
        assert answer.finish_reason == "cancelled" and set(answer.versions) == {0}
        return
    assert set(answer.versions) == {0, 1} and len(answer.ids) == 400
    before = [*job.prompt, *answer.ids[:num_old]]
    if running == "recompute":
        assert answer.ids[num_old:] == text_ids(before, 400 - num_old, batch.vocab_size, version=1)
    else:  # the last old token is written with the new weights
        entries = before[:-1] + [before[-1] + VERSION]
        assert answer.ids[num_old] == text_ids(entries, 1, batch.vocab_size)[0]


def test_pause_and_resume():
    batch, heard, waiting, late = endless_batch(), Heard(), Heard(), Heard()
    with Engine(batch, TOKENIZER) as engine:
        engine.submit(long_job(300), heard)
        wait_for(lambda: len(heard) >= 5)
        engine.pause()
        num_steps, num_heard = len(batch.log), len(heard)
        ticket = engine.submit(long_job(5), waiting)
        engine.submit(long_job(5, deadline=time.monotonic() + 0.05), late)
        with pytest.raises(RuntimeError, match="resume it first"):
            engine.update_weights(fake_weights(1))
        assert late.answer().finish_reason == "deadline"
        ticket.cancel()
        assert waiting.answer().finish_reason == "cancelled"
        assert (len(batch.log), len(heard), engine.stats().paused) == (num_steps, num_heard, True)
        engine.resume()
        assert heard.answer().ids == want_ids(batch, long_job(300))
        engine.pause("finish")
        engine.resume()
        engine.generate([long_job(2)])


def test_a_full_queue_refuses_and_generate_waits():
    batch = endless_batch(num_rows=1)
    with Engine(batch, TOKENIZER, most_waiting=2) as engine:
        heard = Heard()
        ticket = engine.submit(long_job(), heard)
        wait_for(lambda: heard)
        tickets = [engine.submit(long_job(3), Heard()) for _ in range(2)]
        with pytest.raises(QueueFullError) as caught:
            engine.submit(long_job(3), Heard())
        assert 0 < caught.value.retry_after <= 60
        for other in [ticket, *tickets]:
            other.cancel()
        assert [len(answer.ids) for answer in engine.generate([long_job(3)] * 9)] == [3] * 9


def test_if_the_device_fails_every_job_ends_and_the_engine_says_so():
    batch, heard = endless_batch(num_rows=2), [Heard() for _ in range(4)]
    batch.fail_at(30)
    with Engine(batch, TOKENIZER) as engine:
        for listener in heard:
            engine.submit(long_job(), listener)
        for listener in heard:
            answer = listener.answer()
            assert answer.finish_reason == "error" and "the device is gone" in answer.error
        with pytest.raises(ClosedError, match="the device is gone"):
            engine.submit(long_job(), Heard())
        with pytest.raises(ClosedError):
            engine.update_weights(fake_weights(1))
        assert "the device is gone" in engine.stats().error and engine.stats().finished["error"] == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_fails_while_the_engine_closes_leaves_nobody_waiting():
    batch = endless_batch()

    def fail(row):
        raise RuntimeError("the device is gone")

    with ThreadPoolExecutor(1) as caller, Engine(batch, TOKENIZER) as engine:
        engine.submit(long_job(), Heard())
        wait_for(lambda: engine.stats().running)
        waits = caller.submit(engine.update_weights, fake_weights(1))
        wait_for(lambda: engine._stepper._changes)
        batch.close_row = fail
        engine.close()
        try:
            with pytest.raises(RuntimeError, match="the device is gone"):
                waits.result(SECONDS)
        finally:
            for change in engine._stepper._changes:  # or the test would hang
                if not change.done.done():
                    change.done.cancel()


def test_close_drains_for_so_long():
    batch, quick, slow = HeldBatch(), Heard(), Heard()
    engine = Engine(batch, TOKENIZER)
    engine.submit(long_job(50), quick)
    batch.ask(engine, engine.close, drain_seconds=SECONDS)
    assert quick.answer().finish_reason == "length"
    engine = Engine(endless_batch(), TOKENIZER)
    engine.submit(long_job(), slow)
    begin = time.monotonic()
    engine.close(drain_seconds=0.1)
    assert slow.answer().finish_reason == "cancelled" and time.monotonic() - begin >= 0.1
    with pytest.raises(ClosedError):
        engine.submit(long_job(), Heard())
    engine.close()
    assert not engine.batch.rows, "another engine may take the batch"


def test_a_listener_may_submit_and_cancel():
    heard, third, tickets = Heard(), Heard(), []

    def listen(delta):
        if len(delta.ids) and not tickets:
            tickets.append(engine.submit(long_job(4), third))
            first.cancel()
        heard(delta)

    with Engine(endless_batch(), TOKENIZER) as engine:
        first = engine.submit(long_job(), listen)
        assert heard.answer().finish_reason == "cancelled"
        assert len(third.answer().ids) == 4
        first.cancel()


def test_a_listener_that_raises_ends_its_job_alone_and_is_logged_once(caplog):
    heard, other = Heard(), Heard()

    def listen(delta):
        heard(delta)
        if len(heard) >= 3:
            raise KeyError("a fault of the caller")

    with Engine(endless_batch(), TOKENIZER) as engine:
        engine.submit(long_job(), listen)
        engine.submit(long_job(50, prompt=[6]), other)
        assert heard.answer().finish_reason == "cancelled" and len(heard) == 4
        assert len(other.answer().ids) == 50
        check_pages_are_back(engine)
    assert [record.getMessage() for record in caplog.records] == ["a listener has raised; its job is cancelled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"most_waiting": 0}, "most_waiting = 0"), ({"prefill_beside": 2049}, "prefill_beside = 2049 .* 0 to 2048")],
)
def test_options_are_refused_before_anything_is_compiled(options, message):
    with pytest.raises(ValueError, match=message):
        Engine.open(None, None, TOKENIZER, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [3, 262]}, "the id 262"),
        ({"prompt": [-1]}, "the id -1"),
        ({"prompt": [1.5]}, "integers"),
        ({"num_tokens": 0}, "at least 1"),
        ({"num_tokens": -1}, "at least 1"),
        ({"num_tokens": 1022}, "1024 positions.*1021 or less"),
        ({"prompt": [1] * 2000}, "shorten the prompt"),
        ({"num_tokens": 600}, "10 pages"),
        ({"stop": [""]}, "stop string is empty"),
        ({"stop": "("}, "give a list of texts"),
        ({"stop": [262]}, "stop has ids"),
        ({"own": Request(logit_bias={262: 1.0})}, "logit_bias"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_door(options, message):
    num_tokens = options.get("num_tokens", 5)
    options = {name: value for name, value in options.items() if name != "num_tokens"}
    with Engine(FakeBatch(num_pages=9), TOKENIZER) as engine, pytest.raises(ValueError, match=message):
        engine.submit(long_job(num_tokens, **options), Heard())
