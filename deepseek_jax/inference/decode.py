"""Generation of text: the prompt through the latent cache in one pass, then token by token.

A position's cache entry is written when its token goes through the model, and logits come out for the next. With prompt
t0 t1 t2:

    prefill   t0 t1 t2       slots 0 1 2 filled, length 3, logits for position 3 -> t3
    step      t3             slot 3 filled, length 4, logits -> t4
    ...                      until EOS or the last token asked for, which is never run through the model

Prefill works on chunks of a fixed number of tokens, so that its scores [B, N, chunk, M] stay small and prompts of many
lengths share a program. The last chunk is filled up with token 0. Those slots lie at or beyond `length`: a later token
overwrites its slot before anything reads it.

Steps run on the device in bursts of a few tokens, a `lax.while_loop` each, between which the host prints. The noise of
a draw depends on the seed, the row and the position alone, not on where a burst ends.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import StreamDecoder, Tokenizer
from deepseek_jax.inference.cache import Cache, make_cache
from deepseek_jax.inference.sampling import Sampling, sample
from deepseek_jax.model.transformer import compute_dtype, decode_step
from deepseek_jax.parameters import PARAMETERS, leaf_name

Tree = dict[str, Any]

PREFILL_CHUNK = 128  # prompt tokens per pass
BURST = 16  # tokens between two looks of the host
CACHE_STEP = 256  # cache sizes are multiples of this, so that few programs are compiled
# Rows of one expert in a block, and blocks multiplied at once: a decoding batch has far fewer assignments than a
# training batch.
EXPERT_BLOCK, EXPERT_WAVE = 16, 8


class Generation(NamedTuple):
    """Where the decoding of B sequences stands."""

    cache: Cache
    tokens_B: Array  # chosen, not yet run through the model
    finished_B: Array  # bool: has produced EOS


def stream(
    config: Config,
    params: Tree,
    router_bias: Tree,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[str]:
    """Yield the text that continues `prompt` in pieces, up to EOS or `max_new_tokens` tokens; `"".join(...)` is all of
    it.

    Args:
        config: of the model.
        params: as the training state has them, on any mesh that this process sees whole.
        router_bias: likewise.
        tokenizer: of the run.
        prompt: text; it is not repeated in the output.
        max_new_tokens: at most this many tokens follow.
        sampling: temperature, top-p, top-k.
        seed: of the draws; the same seed gives the same text.

    Raises:
        ValueError: an empty prompt, or one that leaves no room for `max_new_tokens`.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character to continue")
    prompt_ids = [tokenizer.bos, *tokenizer.encode(prompt)]  # as every document begins in training
    check_lengths(config, len(prompt_ids), max_new_tokens)
    decoder = StreamDecoder(tokenizer)  # a character may span tokens, and so bursts
    params = params | {
        "head_DV": params["head_DV"][:, : tokenizer.vocab_size]
    }  # ids that no token has are never trained
    for ids in stream_ids(
        config, params, router_bias, np.array([prompt_ids]), max_new_tokens, sampling, seed, tokenizer.eos
    ):
        yield decoder.push(ids[0][ids[0] != tokenizer.eos])
    yield decoder.finish()


def check_lengths(config: Config, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for the tokens asked for."""
    yarn = config.model.yarn
    longest = int(yarn.original_length * yarn.factor) if yarn.enabled else config.data.sequence_length
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    if num_prompt_tokens + max_new_tokens > longest:
        raise ValueError(
            f"a prompt of {num_prompt_tokens} tokens and {max_new_tokens} new ones exceed the {longest} positions this"
            " model knows;"
            + (
                f" set max_new_tokens to {longest - num_prompt_tokens} or less"
                if num_prompt_tokens < longest
                else " shorten the prompt"
            )
        )


def stream_ids(
    config: Config,
    params: Tree,
    router_bias: Tree,
    prompts_BS: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eos: int,
) -> Iterator[np.ndarray]:
    """Yield new token ids [B, up to BURST] for prompts of one length; a sequence that has ended repeats `eos`."""
    config = decode_config(config)
    batch_size, num_prompt_tokens = prompts_BS.shape
    chunks = -(-num_prompt_tokens // PREFILL_CHUNK)
    num_slots = -(-max(num_prompt_tokens + max_new_tokens, chunks * PREFILL_CHUNK) // CACHE_STEP) * CACHE_STEP
    with jax.set_mesh(
        jax.make_mesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.local_devices()[:1])
    ):
        params, router_bias = decode_weights(config, params, router_bias)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch_size))
        cache = make_cache(config, batch_size, num_slots)
        lengths_B = np.full(batch_size, num_prompt_tokens, np.int32)
        logits_BV, cache = prefill(config, params, router_bias, cache, in_chunks(prompts_BS), lengths_B)
        state = first_token(sampling, logits_BV, cache, keys_B, eos)
        yield np.asarray(state.tokens_B)[:, None]
        remaining = max_new_tokens - 1
        while remaining > 0 and not bool(state.finished_B.all()):
            num_tokens = min(remaining, BURST)
            ids_BK, state = decode_burst(config, sampling, BURST, params, router_bias, state, keys_B, eos, num_tokens)
            remaining -= num_tokens
            yield np.asarray(ids_BK)[:, :num_tokens]


def in_chunks(prompts_BS: np.ndarray) -> np.ndarray:
    """Return prompts as [chunks, B, PREFILL_CHUNK] int32, filled up with token 0."""
    batch_size, length = prompts_BS.shape
    filled = np.pad(prompts_BS, ((0, 0), (0, -length % PREFILL_CHUNK))).astype(np.int32)
    return filled.reshape(batch_size, -1, PREFILL_CHUNK).swapaxes(0, 1)


def decode_config(config: Config) -> Config:
    """Return `config` as one device decodes with it: all experts here, in small blocks, and no balance statistics."""
    execution = dataclasses.replace(
        config.execution, exchange="local", experts="blocks", expert_block=EXPERT_BLOCK, expert_wave=EXPERT_WAVE
    )
    loss = dataclasses.replace(config.loss, sequence_balance_weight=0.0, batch_balance_weight=0.0)
    return dataclasses.replace(config, execution=execution, loss=loss)


def decode_weights(config: Config, params: Tree, router_bias: Tree) -> tuple[Tree, Tree]:
    """Return what decoding reads, whole on the mesh's device: no MTP layers, and matrices in the compute dtype."""
    dtype, whole = compute_dtype(config), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(path, weight: Array) -> Array:
        name = leaf_name(path)
        weight = jax.device_put(weight, whole)
        return weight if PARAMETERS[name].precision == "fp32" else weight.astype(dtype)

    params = jax.tree.map_with_path(place, {name: tree for name, tree in params.items() if name != "mtp_layers"})
    return params, jax.device_put({name: tree for name, tree in router_bias.items() if name != "mtp_layers"}, whole)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def prefill(
    config: Config, params: Tree, router_bias: Tree, cache: Cache, chunks: Array, lengths_B: Array
) -> tuple[Array, Cache]:
    """Run prompts through an empty cache.

    Args:
        config: as `decode_config` returns it.
        params: as `decode_weights` returns them.
        router_bias: likewise.
        cache: empty.
        chunks: prompts as `in_chunks` returns them, [chunks, B, S].
        lengths_B: real tokens of each prompt.

    Returns:
        FP32 logits [B, V] of the token after each prompt, and the cache.
    """
    num_chunks, batch_size, size = chunks.shape

    def one_chunk(cache, inputs):
        tokens_BS, start = inputs
        positions_BS = jnp.broadcast_to(start + jnp.arange(size), tokens_BS.shape)
        hidden_BSD, cache = decode_step(config, params, router_bias, cache, tokens_BS, positions_BS)
        return cache, hidden_BSD

    cache, hidden = lax.scan(one_chunk, cache, (chunks, size * jnp.arange(num_chunks)))
    last_B = lengths_B - 1
    hidden_BD = hidden[last_B // size, jnp.arange(batch_size), last_B % size]
    return _logits(params, hidden_BD), cache | {"length": lengths_B}


@functools.partial(jax.jit, static_argnums=0)
def first_token(sampling: Sampling, logits_BV: Array, cache: Cache, keys_B: Array, eos: int) -> Generation:
    """Choose the token after each prompt."""
    tokens_B = sample(sampling, logits_BV, _keys_at(keys_B, cache["length"]))
    return Generation(cache, tokens_B, tokens_B == eos)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def decode_burst(
    config: Config,
    sampling: Sampling,
    burst: int,
    params: Tree,
    router_bias: Tree,
    state: Generation,
    keys_B: Array,
    eos: int,
    num_tokens: int,
) -> tuple[Array, Generation]:
    """Extend every sequence by `num_tokens` (traced, at most `burst`), or until all have ended; return ids [B, burst].

    A sequence that has ended goes on with `eos`; so do the places after `num_tokens`.
    """

    def step(carry):
        i, ids_BK, (cache, tokens_B, finished_B) = carry
        logits_BV, cache = decode_token(config, params, router_bias, cache, tokens_B)
        tokens_B = jnp.where(finished_B, eos, sample(sampling, logits_BV, _keys_at(keys_B, cache["length"])))
        return i + 1, ids_BK.at[:, i].set(tokens_B), Generation(cache, tokens_B, finished_B | (tokens_B == eos))

    def more(carry):
        return (carry[0] < num_tokens) & ~carry[2].finished_B.all()

    ids_BK = jnp.full((state.tokens_B.shape[0], burst), eos, jnp.int32)
    _, ids_BK, state = lax.while_loop(more, step, (0, ids_BK, state))
    return ids_BK, state


def decode_token(config: Config, params: Tree, router_bias: Tree, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
    """Run one token per sequence; return the FP32 logits [B, V] of the next and the cache, one longer."""
    hidden_BSD, written = decode_step(config, params, router_bias, cache, tokens_B[:, None], cache["length"][:, None])
    return _logits(params, hidden_BSD[:, 0]), written | {"length": cache["length"] + 1}


def _logits(params: Tree, hidden_BD: Array) -> Array:
    with jax.named_scope("head"):
        return jnp.matmul(hidden_BD, params["head_DV"], preferred_element_type=jnp.float32)


def _keys_at(keys_B: Array, positions_B: Array) -> Array:
    """The key of each row's draw at its position."""
    return jax.vmap(jax.random.fold_in)(keys_B, positions_B)
