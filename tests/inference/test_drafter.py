"""The MTP layer over the latent cache is that of training, position by position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference.cache import CACHE_SPECS, make_cache
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.prefill import prefill_execution
from deepseek_jax.inference.weights import decode_weights, weight_specs
from deepseek_jax.model import drafter, transformer
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.prefill import Sequences
from deepseek_jax.parameters import ROWS, P
from pallas_kernels.lowering import manual_axes
from tests.inference.test_decode import make_config
from tests.support.drawn import drawn_weights
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("drafter")  # what is compiled once, serves all tests

RNG = np.random.default_rng(5)
TOKENS_BS = RNG.integers(0, 300, (3, 101)).astype(np.int32)


CONFIG = make_config(num_mtp_layers=1).with_(data={"sequence_length": 128})
MESH = mesh_of()


@functools.cache
def trained_states():
    """States [B, S, D] of the MTP layer in the form of training."""

    @jax.jit
    def run(weights, tokens_BS, next_BS):
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        valid_BS = jnp.ones_like(tokens_BS, dtype=bool)
        inputs = transformer.Inputs(tokens_BS, positions_BS, valid_BS, following=(next_BS,))
        return transformer.apply(CONFIG.model, CONFIG.execution, weights, inputs).mtp_hidden[0]

    return np.asarray(run(drawn_weights(CONFIG.model), TOKENS_BS[:, :-1], TOKENS_BS[:, 1:]))


def on_device(function):
    """Jit (weights, pages, rows) -> (states, pages) inside a program's shard_map."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(static, weights, pages, *rows):
        def local(weights, pages, *rows):
            return function(static, manual_axes.vary(weights, frozenset(ROWS)), pages, *rows)

        in_specs = weight_specs(weights), CACHE_SPECS.pages, *[P(ROWS) for _ in rows]
        return jax.shard_map(local, in_specs=in_specs, out_specs=(P(ROWS), CACHE_SPECS.pages))(weights, pages, *rows)

    return lambda static, weights, pages, *rows: run(static, weights, pages, *jax.device_put(rows, P(ROWS)))


@on_device
def prefill(continues, weights, pages, tables_BJ, length_B, new_B, tokens_T, next_T):
    model, execution = CONFIG.model, prefill_execution(CONFIG, MESH)
    sequences = Sequences.of(tables_BJ, length_B, new_B, len(tokens_T))
    options = {"continues": continues, "rows": Rows(0, 0)}
    hidden_TD, pages = transformer.prefill_step(model, execution, weights, pages, tokens_T, sequences, **options)
    return drafter.draft_prefill_step(model, execution, weights, pages, next_T, hidden_TD, sequences, **options)


@on_device
def decode(joined, weights, pages, tables_BJ, tokens_BS, next_BS, positions_BS, valid_BS):
    model, execution = CONFIG.model, decode_execution(CONFIG, MESH)
    places = tables_BJ, tokens_BS, positions_BS, valid_BS
    hidden_BSD, pages = transformer.decode_step(model, execution, weights, pages, *places)
    places = tables_BJ, next_BS, hidden_BSD, positions_BS, valid_BS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafter, "has_kernels", lambda *_: joined)
        return drafter.draft_step(model, execution, weights, pages, *places)


def packed(rows, num_tokens):
    together = np.concatenate(rows)
    return np.pad(together, (0, num_tokens - len(together))).astype(np.int32)


def test_states_over_the_cache_are_those_of_training():
    """Three prompts in pieces of unequal lengths, then steps of three tokens, of which a row takes one, two or all.

    In turns as separate norms, and as a GPU runs it: each norm where the residual stream is summed.
    """
    with jax.set_mesh(MESH):
        execution = decode_execution(CONFIG, MESH)
        weights = decode_weights(CONFIG.model, execution, drawn_weights(CONFIG.model), MESH, drafts=True)
        cache = make_cache(CONFIG.model, execution, 3, 192, drafts=True)
        pages, tables_BJ, length_B = cache.pages + np.float32(np.nan), cache.tables_BJ, np.zeros(3, np.int32)
        got_BSD = np.full_like(trained_states(), np.nan)

        def keep(row, states_SD):
            got_BSD[row, length_B[row] : length_B[row] + len(states_SD)] = states_SD

        for new_B in ([64, 1, 17], [5, 70, 0], [1, 1, 40]):
            spans = [slice(n, n + m) for n, m in zip(length_B, new_B, strict=True)]
            tokens_T = packed([row[span] for row, span in zip(TOKENS_BS[:, :-1], spans, strict=True)], 128)
            next_T = packed([row[span] for row, span in zip(TOKENS_BS[:, 1:], spans, strict=True)], 128)
            continues = bool(length_B.any())
            new_B = np.array(new_B, np.int32)
            states_TD, pages = prefill(continues, weights, pages, tables_BJ, length_B, new_B, tokens_T, next_T)
            for row, end in enumerate(np.cumsum(new_B)):
                keep(row, np.asarray(states_TD)[end - new_B[row] : end])
            length_B = length_B + new_B
        for joined, taken_B in ((False, [1, 2, 3]), (True, [3, 3, 1]), (True, [2, 0, 3]), (False, [3, 1, 2])):
            positions_BS = length_B[:, None] + np.arange(3)
            tokens_BS, next_BS = (np.take_along_axis(TOKENS_BS, positions_BS + i, axis=1) for i in (0, 1))
            taken_BS = np.arange(3) < np.array(taken_B)[:, None]
            tokens_BS = np.where(taken_BS, tokens_BS, 7)  # a draft that is wrong, whose entries are written again
            valid_BS = np.broadcast_to(np.array(taken_B)[:, None] > 0, taken_BS.shape)
            states_BSD, pages = decode(joined, weights, pages, tables_BJ, tokens_BS, next_BS, positions_BS, valid_BS)
            for row, count in enumerate(taken_B):
                keep(row, np.asarray(states_BSD)[row, :count])
            length_B = length_B + np.array(taken_B, np.int32)
    done_BS = np.arange(100) < length_B[:, None]
    want = trained_states()[done_BS]
    np.testing.assert_allclose(got_BSD[done_BS], want, atol=1e-5 * np.abs(want).max())


def test_a_model_without_an_mtp_layer_drafts_nothing():
    config = make_config()
    with pytest.raises(ValueError, match="the MTP layer, and these weights have none; set num_drafts to 0"):
        decode_weights(config.model, config.execution, drawn_weights(config.model), MESH, drafts=True)
