"""An engine of this process as the target of a load: no HTTP, and a token is there when the engine has it.

Its weights are random (`random_weights`), and so is what it says. Every id of the model has a token, so that any of
them may be chosen.
"""

import asyncio
import itertools
import string
from collections.abc import AsyncIterator

import jax
import tokenizers
from tokenizers import decoders, models

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import BOS, EOS, PAD, Tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import expert_mesh
from deepseek_jax.inference.job import ERROR, LENGTH, STOP, Delta, Job, QueueFullError
from deepseek_jax.inference.sampling import Sampling
from experiments.benchmarks.load import Arrival, Asked, Target
from experiments.benchmarks.random_weights import random_weights


def open_engine(config: Config, num_rows: int, num_drafts: int) -> Engine:
    """Return an engine over random weights, its programs compiled.

    Raises:
        ValueError: as `Engine.open`.
    """
    mesh = expert_mesh(config.model, num_devices=1)
    weights = random_weights(config, mesh)
    tokenizer = tokenizer_of(config.model.vocab_size)
    return Engine.open(config, weights, tokenizer, mesh, num_rows=num_rows, num_drafts=num_drafts, most_waiting=100_000)


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """Return a tokenizer with a word for each id, from "aaaa" on; the first three are special."""
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=4))
    names = itertools.islice(itertools.chain((BOS, EOS, PAD), words), vocab_size)
    encoder = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([BOS, EOS, PAD])
    return Tokenizer(encoder, BOS, EOS, PAD)


def target(engine: Engine, temperature: float) -> Target:
    """Return what asks an engine for texts of the whole length; prompts are ids."""
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0)

    async def ask(asked: Asked) -> AsyncIterator[Arrival]:
        loop, deltas = asyncio.get_running_loop(), asyncio.Queue()

        def listen(delta: Delta) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        job = Job(prompt=asked.prompt, max_new_tokens=asked.max_new_tokens, sampling=sampling, ignore_eos=True)
        try:
            ticket = engine.submit(job, listen)
        except QueueFullError as error:
            raise RuntimeError(str(error)) from error
        try:
            reason = None
            while reason is None:
                delta = await deltas.get()
                reason = delta.finish_reason
                yield Arrival(bool(delta.ids), delta.usage.completion_tokens)
            if reason not in (STOP, LENGTH):
                raise RuntimeError(delta.error if reason == ERROR else reason)
        finally:
            ticket.cancel()

    return ask


def describe() -> str:
    """Return the number and kind of the devices, for records."""
    return f"1 x {jax.devices()[0].device_kind}"
