"""Deltas on their way from the engine's thread to a request."""

import asyncio
import threading

from deepseek_jax.inference.completions import TokenLogprob
from deepseek_jax.inference.job import Delta, Usage
from deepseek_jax.serving.answers import Answers, Mailbox, joined


class Engine:
    """Gives its deltas to a listener at once, before the loop can look."""

    def __init__(self, deltas):
        self.deltas = deltas

    def submit(self, job, listener):
        thread = threading.Thread(target=lambda: [listener(delta) for delta in self.deltas])
        thread.start()
        thread.join()
        return self

    def cancel(self):
        pass


class AnyJob:
    deadline = None


def delta_of(i, reason=None):
    return Delta(chr(97 + i), [i], [TokenLogprob(i, -float(i), [])], reason, Usage(3, 0, i + 1), 7)


def test_deltas_that_wait_come_as_one():
    deltas = [delta_of(0)._replace(prompt_logprobs=[None]), *map(delta_of, range(1, 9)), delta_of(9, "stop")]

    async def collect():
        answers = Answers(Engine(deltas), Mailbox(asyncio.get_running_loop()), [AnyJob(), AnyJob()], 5.0)
        with answers:
            return [arrival async for arrival in answers]

    arrivals = asyncio.run(collect())
    assert [number for number, _ in arrivals] == [0, 1]
    for _, delta in arrivals:
        assert delta.text == "abcdefghij" and delta.ids == [*range(10)] and delta.finish_reason == "stop"
        assert [one.token for one in delta.logprobs] == delta.ids and delta.prompt_logprobs == [None]
        assert delta.usage == Usage(3, 0, 10) and delta.version == 7
    assert joined(deltas[:1]) is deltas[0]
