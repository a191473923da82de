"""The programs of decoding: bursts of tokens over the latent cache, after a prefill (`inference.prefill`).

A token that goes through the model writes the cache entry of its position, and logits come out for the next. With
prompt t0 t1 t2:

    prefill   t0 t1 t2       positions 0 1 2 written, length 3, logits for position 3 -> t3
    step      t3             position 3 written, length 4, logits -> t4
    ...                      until EOS or the last token asked for, which is never run through the model

Decoding runs on the axes of the training mesh: sequences are split over `ROWS`, routed experts over `EXPERTS`, and all
other weights are whole on every device. Every device has pages of its own for its sequences. A row of the batch without
a sequence has length 0 and counts as ended. A sequence that has ended reads no page, writes none and reaches no expert.

Steps run on the device in bursts of a few tokens; between bursts the host reads the tokens. A burst is a
`lax.while_loop` that ends when all sequences have. On a GPU its turn is a loop of several steps whose length XLA knows
(`STEPS_TOGETHER`): there the host reads the condition, and the device would wait for it after every token. The noise
of a draw depends only on the row's key and the position, not on where a burst ends.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.config import Config, Execution, Model
from deepseek_jax.inference.cache import CACHE_SPECS, Cache
from deepseek_jax.inference.sampling import Chosen, Rows, Sampling, Seen, choose
from deepseek_jax.inference.weights import weight_specs
from deepseek_jax.model.transformer import decode_step
from deepseek_jax.parallel.context import refuse_context
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.parallel.stages import refuse_pipeline
from deepseek_jax.parameters import ROWS, P, Weights
from pallas_kernels import dispatch
from pallas_kernels.lowering import manual_axes

# Products of fewer rows are slow: XLA writes a product of one row as a pass over the weights that stores every summand.
# A row without a sequence reads no page and no expert.
GPU_ROWS = 16
# Rows of one expert in a block, and blocks multiplied at once. A decoding batch has far fewer assignments than a
# training batch, so both are small.
EXPERT_BLOCK, EXPERT_WAVE = 16, 8
# Steps of a burst between two questions whether all sequences have ended. The host of a GPU reads the answer, and the
# device waits for it 0.18 ms (`v3_5b`, batch 1, BF16; log.md); on others a question costs nothing. So a burst is
# rounded up to whole turns: with max_new_tokens = 2 eight steps run. One that nobody wants reads no expert and no page,
# but still attention's weights and the head.
STEPS_TOGETHER = 8


class Generation(NamedTuple):
    """Where the decoding of B sequences stands."""

    cache: Cache
    tokens_B: Array  # chosen, not yet run through the model
    finished_B: Array  # bool: has produced EOS, or is a row without a sequence
    seen: Seen | None = None  # where the sampling has penalties


def decode_execution(config: Config, mesh: jax.sharding.Mesh) -> Execution:
    """Return the execution of decoding on `mesh`: layers in a loop, experts in small blocks, no recomputation.

    Raises:
        ValueError: devices of the mesh share sequences.
    """
    refuse_context(mesh, "decoding")
    refuse_pipeline(dict(mesh.shape), "decoding")
    small = {"experts": "blocks", "expert_block": EXPERT_BLOCK, "expert_wave": EXPERT_WAVE}
    changes = {"exchange": "auto", "remat": "none", "scan_unroll": 1} | small
    return resolve_for(config.with_(execution=changes), mesh).execution


def num_rows(num_sequences: int, mesh: jax.sharding.Mesh) -> int:
    """Return the rows of a batch: the devices get as many each, and a GPU a multiple of `GPU_ROWS`."""
    unit = GPU_ROWS if mesh.devices.flat[0].platform == "gpu" else 1
    return num_sequences + -num_sequences % (unit * axis_size(mesh, ROWS))


def first_token(
    sampling: Sampling, logits_BV: Array, cache: Cache, rows: Rows, eos: int, prompts_BS: Array | None = None
) -> tuple[Chosen, Generation]:
    """Choose the token after each prompt; penalties need the prompts, filled up to the longest."""

    def local(logits_BV, length_B, rows, eos, prompts_BS):
        seen = None
        if sampling.penalizes:
            seen = Seen.of_prompts(prompts_BS, length_B, logits_BV.shape[-1])
        chosen = choose(sampling, logits_BV, rows, length_B, seen)
        return chosen, (chosen.ids_B == eos) | (length_B == 0), seen and seen.add(chosen.ids_B)

    split = P(ROWS)
    run = jax.shard_map(
        local, in_specs=(split, split, split, P(), split), out_specs=(split, split, _seen_specs(sampling))
    )
    chosen, finished_B, seen = run(logits_BV, cache.length_B, rows, eos, prompts_BS)
    return chosen, Generation(cache, chosen.ids_B, finished_B, seen)


def decode_burst(
    model: Model,
    execution: Execution,
    sampling: Sampling,
    burst: int,
    weights: Weights,
    state: Generation,
    rows: Rows,
    eos: int,
    num_tokens: int,
) -> tuple[Chosen, Generation]:
    """Extend every sequence by `num_tokens` (traced, at most `burst`), or until all have ended.

    Returns:
        Tokens [B, burst] and the new state. `eos` fills a row after its sequence has ended, and every row after
        `num_tokens`.
    """
    together = steps_together(burst)

    def local(weights, state, rows, eos, num_tokens):
        weights = _varying(weights)

        def step(i, carry):
            chosen_BK, state = carry
            cache, tokens_B, finished_B, seen = state
            wanted = i < num_tokens  # steps behind the last token leave everything as it is
            logits_BV, cache = _decode_token(model, execution, weights, cache, tokens_B, ~finished_B & wanted)
            chosen = choose(sampling, logits_BV, rows, cache.length_B, seen)
            tokens_B = jnp.where(finished_B, eos, chosen.ids_B)
            after: Any = tokens_B, finished_B | (tokens_B == eos), seen and seen.add(tokens_B)
            new = jax.tree.map(lambda all_, new: all_.at[:, i].set(new), chosen_BK, chosen._replace(ids_B=tokens_B))
            if together > 1:
                new, after = _choose(wanted, (new, after), (chosen_BK, state[1:]))
            return new, Generation(cache, *after)

        def steps(carry):
            i, _, *carry = carry
            carry = lax.fori_loop(0, together, lambda j, carry: step(i + j, carry), tuple(carry))
            return i + together, _all(carry[1].finished_B), *carry

        def unfinished(carry):
            return (carry[0] < num_tokens) & ~carry[1]

        chosen_BK = Chosen.filled(sampling, (state.tokens_B.shape[0], burst), eos)
        chosen_BK = manual_axes.vary(chosen_BK, frozenset(ROWS))
        _, _, chosen_BK, state = lax.while_loop(unfinished, steps, (0, _all(state.finished_B), chosen_BK, state))
        return chosen_BK, state

    split: Any = P(ROWS)
    state_specs = Generation(CACHE_SPECS, split, split, _seen_specs(sampling))
    in_specs = (weight_specs(weights), state_specs, P(ROWS), P(), P())
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(P(ROWS), state_specs))
    return run(weights, state, rows, eos, num_tokens)


def decode_token(
    model: Model, execution: Execution, weights: Weights, cache: Cache, tokens_B: Array
) -> tuple[Array, Cache]:
    """Run one token per sequence; return FP32 logits [B, V] of the next one, and the cache, one token longer."""

    def local(weights, cache, tokens_B):
        return _decode_token(model, execution, _varying(weights), cache, tokens_B, cache.length_B > 0)

    in_specs = (weight_specs(weights), CACHE_SPECS, P(ROWS))
    return jax.shard_map(local, in_specs=in_specs, out_specs=(P(ROWS), CACHE_SPECS))(weights, cache, tokens_B)


def _decode_token(
    model: Model, execution: Execution, weights: Weights, cache: Cache, tokens_B: Array, running_B: Array
) -> tuple[Array, Cache]:
    """Run a token of each running sequence; the others write nothing, read nothing, and stay as long as they are."""
    pages, tables_BJ, length_B = cache
    new = tokens_B[:, None], length_B[:, None], running_B[:, None]
    hidden_BSD, pages = decode_step(model, execution, weights, pages, tables_BJ, *new)
    return _logits(weights, hidden_BSD[:, 0]), Cache(pages, tables_BJ, length_B + running_B)


def _logits(weights: Weights, hidden_BD: Array) -> Array:
    with jax.named_scope("head"):
        return jnp.matmul(hidden_BD, weights.params["head_DV"], preferred_element_type=jnp.float32)


def _all(finished_B: Array) -> Array:
    """Return whether every row of every device has ended; all devices get the same, so they leave a loop together."""
    return lax.pmin(finished_B.all().astype(jnp.int32), ROWS) > 0


def _varying(weights: Weights) -> Weights:
    """Declare weights to vary like the rows that they are multiplied with."""
    return manual_axes.vary(weights, frozenset(ROWS))


def steps_together(burst: int) -> int:
    """Return how many steps of a burst are a loop of known length."""
    return math.gcd(burst, STEPS_TOGETHER) if dispatch.on_hopper() else 1


def _choose(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), yes, no)


def _seen_specs(sampling: Sampling) -> Seen | None:
    rows: Any = P(ROWS)
    return Seen(rows, rows) if sampling.penalizes else None
