"""The host's pages and the device's together: sequences that share, copy, shrink and evict see what they see alone."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.inference import decode
from deepseek_jax.inference.page_pool import PAGE_SIZE, FullError, PagePool
from deepseek_jax.inference.pages import PagedSequence
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.model import transformer
from tests.inference.test_decode import CONFIG, expanded_logits, make_weights
from tests.support.meshes import mesh_of

NUM_PAGES, LONGEST, CHUNK = 9, 256, 4
PROMPTS = [np.random.default_rng(7).integers(0, 300, 200).tolist() for _ in range(2)]  # of which all begin with a piece


class Device:
    """The pages of a device, full of NaN, and the programs on them."""

    def __init__(self):
        self.execution = decode.decode_execution(CONFIG, mesh_of())
        placed = decode_weights(CONFIG.model, self.execution, make_weights(), mesh_of())
        self.weights = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), placed)  # on no mesh
        width = CONFIG.model.kv_latent + CONFIG.model.rotary_dim
        self.pages = jnp.full((CONFIG.model.num_layers, NUM_PAGES, PAGE_SIZE, width), jnp.nan)
        self._step = jax.jit(functools.partial(transformer.decode_step, CONFIG.model, self.execution))
        self._copy = jax.jit(lambda pages, source, target: pages.at[:, target].set(pages[:, source]))

    def append(self, sequence, ids):
        """Write `ids`, a few at once and the rest one by one; return the hidden state of the last."""
        for source, target in sequence.reserve(len(ids)):
            self.pages = self._copy(self.pages, source, target)
        row_J = np.full(LONGEST // PAGE_SIZE, -7, np.int32)  # a number that no page has
        sequence.fill(row_J)
        hidden_BSD = None
        while ids:
            size = CHUNK if len(ids) >= CHUNK else 1
            part, ids = ids[:size], ids[size:]
            positions_S = len(sequence) + np.arange(size, dtype=np.int32)
            new = np.array([part], np.int32), positions_S[None], np.ones((1, size), bool)
            hidden_BSD, self.pages = self._step(self.weights, self.pages, row_J[None], *new)
            sequence.commit(part)
        return hidden_BSD[0, -1]


def check(hidden_D, ids):
    """The logits after `ids` are those of the expanded form over all of them."""
    whole = np.array([ids + [0] * (LONGEST - len(ids))])
    want_V = np.asarray(expanded_logits(CONFIG, make_weights(), whole)[0, len(ids) - 1])
    got_V = np.asarray(hidden_D @ make_weights().params["head_DV"])
    np.testing.assert_allclose(got_V, want_V, rtol=0, atol=2e-5 * np.abs(want_V).max())


def test_sequences_that_share_pages_see_what_they_see_alone():
    """120 random operations on nine pages: prompts with prefixes of 0 to 3 pages, forks, drafts that go back, ends."""
    rng, pool, device, alive, found = random.Random(3), PagePool(NUM_PAGES), Device(), {}, set()
    for _ in range(120):
        kind = rng.choices(("open", "append", "fork", "shrink", "close"), weights=(4, 5, 1, 2, 1 + len(alive)))[0]
        if kind == "open" or not alive:
            prompt = rng.choice(PROMPTS)[: rng.choice((1, 63, 64, 65, 130, 200))] + [rng.randrange(300)]
            sequence = PagedSequence.open(pool, prompt)
            found.add(len(sequence) // PAGE_SIZE)
            ids, new = prompt[: len(sequence)], prompt[len(sequence) :]
            alive[sequence] = ids
        else:
            sequence, new = rng.choice(list(alive)), []
        if kind == "close":
            sequence.close()
            del alive[sequence]
            continue
        if kind == "fork":
            other = sequence.fork()
            alive[other], sequence = alive[sequence], other
        if kind == "shrink":
            keep = max(0, len(sequence) - rng.randrange(70))
            sequence.shrink(keep)
            alive[sequence] = alive[sequence][:keep]
        new = new or [rng.randrange(300) for _ in range(rng.randint(1, 40))]
        if len(sequence) + len(new) > LONGEST:
            new = new[: LONGEST - len(sequence)]
        try:
            hidden_D = device.append(sequence, new) if new else None
        except FullError:
            sequence.close()  # preempted
            del alive[sequence]
            found.add("full")
            continue
        alive[sequence] = alive[sequence] + new
        if hidden_D is not None:
            check(hidden_D, alive[sequence])
    assert {0, 1, 2, 3, "full"} <= found and pool.num_evicted > 3, (found, pool.num_evicted)
