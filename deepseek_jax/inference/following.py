"""The MTP layer over prompts: it follows a call of prefill, so that the step behind it can draft (`speculative`)."""

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax.config import Execution, Model
from deepseek_jax.inference.row_programs import PAGES, SPLIT, Packed, of_rows
from deepseek_jax.inference.row_state import Progress
from deepseek_jax.inference.weights import weight_specs
from deepseek_jax.model.drafter import draft_prefill_step
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.prefill import Sequences
from deepseek_jax.parameters import ROWS, P, Weights
from pallas_kernels.lowering import manual_axes


def follow_prefill(
    model: Model,
    execution: Execution,
    rows: Rows,
    weights: Weights,
    pages: Array,
    draft_BD: Array,
    progress: Progress,
    tables_BJ: Array,
    packed: Packed,
    hidden_TD: Array,
    following_R: Array,
) -> tuple[Array, Array]:
    """Run the MTP layer over pieces of prompts, behind `row_programs.prefill` and `first`; return pages and states.

    Args:
        model: shape and mathematics.
        execution: of prefill.
        rows: that the pieces fill (`model.packed`).
        weights: as `decode_weights` returns them with `drafts`.
        pages: donated.
        draft_BD: donated.
        progress: of the rows, the pieces and the first tokens included.
        tables_BJ: int32, pages of each row.
        packed: the pieces.
        hidden_TD: their hidden states, filled up.
        following_R: the prompt's token behind each piece; of the last one it is the token that was chosen.
    """

    def local(weights, pages, draft_BD, progress, tables_BJ, packed, hidden_TD, following_R):
        weights = manual_axes.vary(weights, frozenset(ROWS))
        row_R, new_R, num_tokens = packed.row_R, packed.new_R, len(packed.tokens_T)
        start_R = of_rows(progress.length_B, row_R) - new_R
        sequences = Sequences.of(of_rows(tables_BJ, row_R), start_R, new_R, num_tokens)
        following_R = jnp.where(packed.last_R, of_rows(progress.token_B, row_R), following_R)
        end_R = jnp.cumsum(new_R) - 1
        next_T = jnp.roll(packed.tokens_T, -1)
        next_T = next_T.at[jnp.where(new_R > 0, end_R, num_tokens)].set(jnp.maximum(following_R, 0), mode="drop")
        options = {"continues": True, "rows": rows}
        step = model, execution, weights, pages, next_T, hidden_TD[:num_tokens], sequences
        states_TD, pages = draft_prefill_step(*step, **options)
        states_RD = states_TD[jnp.maximum(end_R, 0)]
        return pages, draft_BD.at[jnp.where(new_R > 0, row_R, len(draft_BD))].set(states_RD, mode="drop")

    in_specs = weight_specs(weights), PAGES, *[SPLIT] * 6
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(PAGES, P(ROWS)))
    return run(weights, pages, draft_BD, progress, tables_BJ, packed, hidden_TD, following_R)
