"""Generation of text: prompts go through the model, then tokens follow and are yielded as they are made."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from deepseek_jax.config import Config, Mesh, Model
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.cache import make_cache
from deepseek_jax.inference.decode import (
    Generation,
    decode_burst,
    decode_execution,
    first_token,
    num_rows,
)
from deepseek_jax.inference.memory import check_room
from deepseek_jax.inference.prefill import prefill_execution, run_prefill
from deepseek_jax.inference.requests import PLAIN, Request, check_bias, make_rows
from deepseek_jax.inference.sampling import NO_TOKEN, Chosen, Sampling
from deepseek_jax.inference.text import Text
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.inputs import shown
from deepseek_jax.parallel.mesh import check_model_fit, make_mesh
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.parameters import ROWS, P, Weights

BURST = 16  # tokens that the device makes before the host reads them
CACHE_STEP = 256  # cache sizes are multiples of this, so that few programs are compiled


def stream(
    config: Config,
    weights: Weights,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
    stop: Sequence[str | int] = (),
) -> Iterator[str]:
    """Yield the text that continues `prompt` as it is made, up to EOS, a stop string or `max_new_tokens` tokens.

    The pieces join to the whole text: `"".join(stream(...))`.

    Args:
        config: says model, execution, and the longest sequence.
        weights: as the training state has them, or in FP8 as a checkpoint stores them; on any mesh that this process
            sees whole.
        tokenizer: the one of the model's training.
        prompt: text, or ids as `data.chat` makes them, BOS included; the output does not repeat it.
        max_new_tokens: at most this many tokens follow.
        sampling: temperature, top-p, top-k.
        seed: seed of the draws; the same seed gives the same text.
        mesh: the mesh that decodes, with the axes of a training mesh; by default the first device alone.
        stop: the text ends before the first of these texts, or tokens by id.

    Raises:
        ValueError: an empty prompt or stop string, a prompt that is not text or leaves no room for `max_new_tokens`; a
            tokenizer with more ids than the model; weights in FP8 for an FP32 model; weights whose logits are not
            numbers.
    """
    prompts = [prompt_ids(config, tokenizer, prompt, max_new_tokens)]
    weights, text, stopped_B = known_ids(weights, tokenizer), Text(tokenizer, stop), np.zeros(1, bool)
    for ids in stream_ids(config, weights, prompts, max_new_tokens, sampling, seed, tokenizer.eos, mesh, stopped_B):
        yield text.push(ids[0])
        stopped_B[0] = text.reason is not None
    yield text.finish()


def prompt_ids(config: Config, tokenizer: Tokenizer, prompt: str | Sequence[int], max_new_tokens: int) -> Sequence[int]:
    """Return the ids of a prompt; one in text begins as every document in training, with BOS.

    Raises:
        ValueError: the prompt is empty, is not text, or leaves no room for `max_new_tokens`; the tokenizer has more ids
            than the model.
    """
    if not len(prompt):
        raise ValueError("the prompt is empty; give at least one character to continue")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, and model.vocab_size is"
            f" {config.model.vocab_size}; use the tokenizer of the model's training"
        )
    if isinstance(prompt, str):
        if not prompt.isascii() and prompt.encode(errors="replace").decode() != prompt:
            raise ValueError(f"the prompt {shown(prompt)} is not text that UTF-8 can write; give it in UTF-8")
        prompt = [tokenizer.bos, *tokenizer.encode(prompt)]
    check_lengths(config, len(prompt), max_new_tokens)
    return prompt


def known_ids(weights: Weights, tokenizer: Tokenizer) -> Weights:
    """Return weights whose head lacks the ids that no token has: they are never trained.

    Raises:
        ValueError: they are not `Weights`, or have no head.
    """
    if not isinstance(weights, Weights):
        raise ValueError(f"weights is of type {type(weights).__name__}; give `deepseek_jax.parameters.Weights`")
    trees = weights.params, weights.router_bias
    head_DV = weights.params.get("head_DV") if all(isinstance(tree, Mapping) for tree in trees) else None
    if head_DV is None or getattr(head_DV, "ndim", None) != 2:
        raise ValueError("weights has no matrix head_DV in its params; give all weights of a model")
    known_DV = head_DV[:, : tokenizer.vocab_size]
    return weights._replace(params=weights.params | {"head_DV": known_DV})


def expert_mesh(model: Model, num_devices: int, num_groups: int = 1) -> jax.sharding.Mesh:
    """Return a mesh of this process's first devices: groups of `num_devices` that share the routed experts.

    Each device has all other weights, and its own share of the sequences.

    Raises:
        ValueError: there are fewer devices, or the model does not divide over them.
    """
    devices, count = jax.local_devices(), num_devices * num_groups
    if count > len(devices):
        groups = f" in {num_groups} groups" if num_groups > 1 else ""
        raise ValueError(
            f"{count} expert devices{groups} are asked for, and there are {len(devices)}; lower --expert_devices, or"
            " simulate more with --cpu_devices"
        )
    sizes = Mesh(pipe=1, data=num_groups, node=1, expert=num_devices, tensor=1)
    mesh = make_mesh(sizes, devices[:count])
    check_model_fit(model, mesh)
    return mesh


def longest_text(config: Config) -> int:
    """Return how many positions the model knows."""
    yarn = config.model.yarn
    return int(yarn.original_length * yarn.factor) if yarn.enabled else config.data.sequence_length


def check_lengths(config: Config, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for `max_new_tokens`."""
    longest = longest_text(config)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    if num_prompt_tokens + max_new_tokens > longest:
        num_left = longest - num_prompt_tokens
        remedy = f"set max_new_tokens to {num_left} or less" if num_left > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {num_prompt_tokens} tokens and {max_new_tokens} new ones exceed the {longest} positions this"
            f" model knows; {remedy}"
        )


def stream_ids(*args, **options) -> Iterator[np.ndarray]:
    """Yield the ids of what `stream_chosen` yields, of which all arguments are."""
    for chosen in stream_chosen(*args, **options):
        yield np.asarray(chosen.ids_B)


def stream_chosen(
    config: Config,
    weights: Weights,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eos: int,
    mesh: jax.sharding.Mesh | None = None,
    stopped_B: np.ndarray | None = None,
    first_row: int = 0,
    batch_size: int = 0,
    requests: Sequence[Request] = (),
) -> Iterator[Chosen]:
    """Yield new tokens [B, up to BURST] for prompts of any lengths; a sequence that has ended repeats `eos`.

    Args:
        config: as all others that are not named here, see `stream`.
        prompts: B sequences of ids.
        sampling: with `num_logprobs`, log-probabilities come along.
        seed: for requests without one.
        eos: the id that ends a sequence.
        stopped_B: bool, read between bursts: sequences that the caller wants no more of end there.
        first_row: number of the first sequence, on which its draws depend.
        batch_size: rows, if there are fewer sequences.
        requests: what each sequence asks for, or nothing where none asks for anything.

    Raises:
        ValueError: `prompts` have ids beyond the vocabulary or one is empty, `seed` has more than 64 bits, a bias is
            for an id that the vocabulary lacks, the cache does not fit the memory, or logits are not numbers.
    """
    requests = requests or [PLAIN] * len(prompts)
    _check_ids(config.model, prompts, seed)
    for request in requests:
        check_bias(request, weights.params["head_DV"].shape[1])
    mesh = mesh or expert_mesh(config.model, 1)
    model, execution = config.model, decode_execution(config, mesh)
    num_sequences = len(prompts)
    batch_size = num_rows(max(num_sequences, batch_size), mesh)
    new_tokens = [*prompts, *[()] * (batch_size - num_sequences)]
    num_positions = max(map(len, prompts)) + max_new_tokens
    num_slots = -(-num_positions // CACHE_STEP) * CACHE_STEP
    check_room(model, execution, batch_size, num_slots, mesh)
    with jax.set_mesh(mesh):
        weights = decode_weights(model, execution, weights, mesh)
        rows = jax.device_put(make_rows(requests, seed, batch_size, first_row), P(ROWS))
        cache = make_cache(model, execution, batch_size, num_slots)
        logits_BV, cache = run_prefill(model, prefill_execution(config, mesh), mesh, weights, cache, new_tokens)
        prompts_BS = jax.device_put(_padded(new_tokens), P(ROWS)) if sampling.penalizes else None
        chosen, state = jit_on(first_token, execution, mesh, sampling)(logits_BV, cache, rows, eos, prompts_BS)
        yield _read(chosen, num_sequences, None)
        burst = jit_on(decode_burst, execution, mesh, model, execution, sampling, BURST, donate=(1,))

        def more(state: Generation, num_tokens: int) -> tuple[Chosen, Generation]:
            return burst(weights, state, rows, eos, num_tokens)

        yield from _following(more, state, max_new_tokens - 1, num_sequences, stopped_B)


def _following(
    more: Callable[[Generation, int], tuple[Chosen, Generation]],
    state: Generation,
    num_tokens: int,
    num_sequences: int,
    stopped_B: np.ndarray | None,
) -> Iterator[Chosen]:
    """Yield the tokens after the first, burst by burst."""
    while num_tokens > 0:
        state, has_ended = _stop(state, stopped_B)
        if has_ended:
            return
        chosen, state = more(state, min(num_tokens, BURST))
        yield _read(chosen, num_sequences, slice(min(num_tokens, BURST)))
        num_tokens -= BURST


def _check_ids(model: Model, prompts: Sequence[Sequence[int]] | np.ndarray, seed: int) -> None:
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty, or there is none; give at least one id")
    ids = np.concatenate([np.asarray(prompt) for prompt in prompts])
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise ValueError(f"the prompts have ids beyond 0 to {model.vocab_size - 1}; use the model's tokenizer")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed = {seed} does not fit into 64 bits; choose a smaller one")


def _stop(state: Generation, stopped_B: np.ndarray | None) -> tuple[Generation, bool]:
    """Return the state in which the sequences of `stopped_B` have ended too, and whether all have."""
    finished_B = np.array(state.finished_B)
    if stopped_B is None:
        return state, bool(finished_B.all())
    new_B = stopped_B & ~finished_B[: len(stopped_B)]
    finished_B[: len(stopped_B)] |= stopped_B
    if new_B.any():
        state = state._replace(finished_B=jax.device_put(finished_B, P(ROWS)))
    return state, bool(finished_B.all())


def _padded(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return prompts [B, S] filled up with token 0, S a power of two, so that few programs are compiled."""
    longest = max(map(len, prompts))
    prompts_BS = np.zeros((len(prompts), 1 << (longest - 1).bit_length()), np.int32)
    for row, prompt in zip(prompts_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    return prompts_BS


def _read(chosen: Chosen, num_sequences: int, columns: slice | None) -> Chosen:
    """Return tokens on the host: of the rows with a sequence, and these columns, or one that is new."""
    chosen = jax.tree.map(lambda leaf: np.asarray(leaf)[:num_sequences, columns], chosen)
    if (chosen.ids_B == NO_TOKEN).any():
        raise ValueError(
            "the logits are NaN or infinite: the weights are damaged; take another --step, or import the checkpoint"
            " again after convert_hf verify"
        )
    return chosen
