"""Generation of text: the prompt goes through the model, then tokens follow and are yielded as they are made."""

from collections.abc import Iterator

import jax
import numpy as np
from jax import Array

from deepseek_jax.config import Config, Mesh, Model
from deepseek_jax.data.tokenizer import StreamDecoder, Tokenizer
from deepseek_jax.inference.cache import make_cache
from deepseek_jax.inference.decode import decode_burst, decode_execution, first_token, in_chunks, prefill
from deepseek_jax.inference.sampling import NO_TOKEN, Sampling
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.inputs import shown
from deepseek_jax.parallel.mesh import axis_size, check_model_fit, make_mesh
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.parameters import ROWS, P, Weights

BURST = 16  # tokens that the device makes before the host reads them
CACHE_STEP = 256  # cache sizes are multiples of this, so that few programs are compiled


def stream(
    config: Config,
    weights: Weights,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[str]:
    """Yield the text that continues `prompt` as it is made, up to EOS or `max_new_tokens` tokens.

    The pieces join to the whole text: `"".join(stream(...))`.

    Args:
        config: says model, execution, and the longest sequence.
        weights: as the training state has them, or in FP8 as a checkpoint stores them; on any mesh that this process
            sees whole.
        tokenizer: the one of the model's training.
        prompt: text; the output does not repeat it.
        max_new_tokens: at most this many tokens follow.
        sampling: temperature, top-p, top-k.
        seed: seed of the draws; the same seed gives the same text.
        mesh: the mesh that decodes, with the axes of a training mesh; by default the first device alone.

    Raises:
        ValueError: an empty prompt, one that is not text, or one that leaves no room for `max_new_tokens`; a tokenizer
            with more ids than the model; weights in FP8 for an FP32 model; weights whose logits are not numbers.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character to continue")
    if not prompt.isascii() and prompt.encode(errors="replace").decode() != prompt:
        raise ValueError(f"the prompt {shown(prompt)} is not text that UTF-8 can write; give it in UTF-8")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, and model.vocab_size is"
            f" {config.model.vocab_size}; use the tokenizer of the model's training"
        )
    prompt_ids = [tokenizer.bos, *tokenizer.encode(prompt)]  # as every document begins in training
    check_lengths(config, len(prompt_ids), max_new_tokens)
    decoder = StreamDecoder(tokenizer)  # a character may span tokens, and so bursts
    known_DV = weights.params["head_DV"][:, : tokenizer.vocab_size]  # ids that no token has are never trained
    weights = weights._replace(params=weights.params | {"head_DV": known_DV})
    prompts = np.array([prompt_ids])
    for ids in stream_ids(config, weights, prompts, max_new_tokens, sampling, seed, tokenizer.eos, mesh):
        yield decoder.push(ids[0][ids[0] != tokenizer.eos])
    yield decoder.finish()


def expert_mesh(model: Model, num_devices: int) -> jax.sharding.Mesh:
    """Return a mesh of this process's first devices that share the routed experts; each has all other weights.

    Raises:
        ValueError: there are fewer devices, or the model does not divide over them.
    """
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise ValueError(
            f"{num_devices} expert devices are asked for, and there are {len(devices)}; lower --expert_devices, or"
            " simulate more with --cpu_devices"
        )
    sizes = Mesh(pipe=1, data=1, node=1, expert=num_devices, tensor=1)
    mesh = make_mesh(sizes, devices[:num_devices])
    check_model_fit(model, mesh)
    return mesh


def check_lengths(config: Config, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for `max_new_tokens`."""
    yarn = config.model.yarn
    longest = int(yarn.original_length * yarn.factor) if yarn.enabled else config.data.sequence_length
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    if num_prompt_tokens + max_new_tokens > longest:
        num_left = longest - num_prompt_tokens
        remedy = f"set max_new_tokens to {num_left} or less" if num_left > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {num_prompt_tokens} tokens and {max_new_tokens} new ones exceed the {longest} positions this"
            f" model knows; {remedy}"
        )


def stream_ids(
    config: Config,
    weights: Weights,
    prompts_BS: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eos: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Yield new token ids [B, up to BURST] for prompts of one length; a sequence that has ended repeats `eos`.

    Raises:
        ValueError: `prompts_BS` has ids beyond the vocabulary, `seed` more than 64 bits, or logits are not numbers.
    """
    if prompts_BS.min() < 0 or prompts_BS.max() >= config.model.vocab_size:
        raise ValueError(f"the prompts have ids beyond 0 to {config.model.vocab_size - 1}; use the model's tokenizer")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed = {seed} does not fit into 64 bits; choose a smaller one")
    mesh = mesh or expert_mesh(config.model, 1)
    model, execution = config.model, decode_execution(config, mesh)
    num_sequences, num_prompt_tokens = prompts_BS.shape
    prompts_BS = np.pad(prompts_BS, ((0, -num_sequences % axis_size(mesh, ROWS)), (0, 0)))
    batch_size = len(prompts_BS)
    lengths_B = np.where(np.arange(batch_size) < num_sequences, num_prompt_tokens, 0).astype(np.int32)
    chunks = in_chunks(prompts_BS)
    num_positions = max(num_prompt_tokens + max_new_tokens, chunks.shape[0] * chunks.shape[2])
    num_slots = -(-num_positions // CACHE_STEP) * CACHE_STEP
    with jax.set_mesh(mesh):
        weights = decode_weights(execution, weights, mesh)
        keys_B = jax.device_put(row_keys(seed, batch_size), P(ROWS))
        cache = make_cache(model, execution, batch_size, num_slots)
        chunks, lengths_B = jax.device_put((chunks, lengths_B), (P(None, ROWS), P(ROWS)))
        run_prefill = jit_on(prefill, execution, mesh, model, execution, donate=(1,))
        logits_BV, cache = run_prefill(weights, cache, chunks, lengths_B)
        state = jit_on(first_token, execution, mesh, sampling)(logits_BV, cache, keys_B, eos)
        yield _checked(np.asarray(state.tokens_B)[:num_sequences, None])
        burst = jit_on(decode_burst, execution, mesh, model, execution, sampling, BURST, donate=(1,))
        remaining = max_new_tokens - 1
        while remaining > 0 and not bool(np.asarray(state.finished_B).all()):
            num_tokens = min(remaining, BURST)
            ids_BK, state = burst(weights, state, keys_B, eos, num_tokens)
            remaining -= num_tokens
            yield _checked(np.asarray(ids_BK)[:num_sequences, :num_tokens])


def _checked(ids_BK: np.ndarray) -> np.ndarray:
    if (ids_BK == NO_TOKEN).any():
        raise ValueError(
            "the logits are NaN or infinite: the weights are damaged; take another --step, or import the checkpoint"
            " again after convert_hf verify"
        )
    return ids_BK


def row_keys(seed: int, batch_size: int) -> Array:
    """Return a key for the draws of each row; it depends only on the seed and the row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(batch_size))
