"""The programs of a `DeviceBatch` that drafts tokens (`speculative`), in the place of those that decode one a row."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Execution, Model
from deepseek_jax.inference import following, speculative
from deepseek_jax.inference.row_calls import Calls
from deepseek_jax.inference.row_programs import Packed, Told
from deepseek_jax.inference.row_sampling import ANY, BY_ID, DRAWN, GREEDY, reads_seen
from deepseek_jax.inference.row_state import Sizes
from deepseek_jax.inference.speculative import MOST_DRAFTS, Kind
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parameters import ROWS, P, Weights

# Of the programs. A masked row needs the last, whose steps guess for it; those with bias or penalties run in it, too.
DRAFTING_KINDS = GREEDY, DRAWN, ANY


def check_drafts(num_drafts: int, model: Model) -> None:
    """Refuse more drafts than a step verifies, and drafts of a model without an MTP layer."""
    if not 0 <= num_drafts <= MOST_DRAFTS:
        raise ValueError(f"num_drafts = {num_drafts} must be from 0 to {MOST_DRAFTS}; 0 drafts nothing")
    if num_drafts and not model.num_mtp_layers:
        raise ValueError(
            f"num_drafts = {num_drafts} needs an MTP layer, and the model has none (model.num_mtp_layers = 0); set"
            " num_drafts to 0"
        )


class DraftingCalls(Calls):
    """Calls whose rows also have a state of the MTP layer.

    While more rows decode than drafting is for, a step drafts nothing, and the MTP layer only follows.
    """

    def __init__(
        self,
        model: Model,
        executions: tuple[Execution, Execution],
        mesh: jax.sharding.Mesh,
        sizes: Sizes,
        weights: Weights,
        burst: int | None,
        num_drafts: int,
        drafting_rows: int | None,
        forced: float | None = None,
    ):
        """Begin as `Calls`; `weights` have the MTP layer. `forced` is for benchmarks (`acceptance.verify`)."""
        super().__init__(model, executions, mesh, sizes, weights, burst)
        self._num_drafts, self._forced = num_drafts, forced
        self._drafting_rows = sizes.rows if drafting_rows is None else drafting_rows
        with jax.set_mesh(mesh):
            shape, dtype = (sizes.rows, model.width), compute_dtype(executions[0])
            self._draft_BD = jnp.zeros(shape, dtype, out_sharding=P(ROWS))

    def decode(self, rows_B: np.ndarray, kind: str, num_tokens: int) -> tuple[Told, int]:
        """Decode tokens of each of these rows, as `Calls.decode`: in `num_tokens` steps, each with its drafts."""
        width, choosing, drafts = self._step_of(rows_B, kind)
        program = self._program(("speculate", width, choosing, num_tokens, drafts))
        rows = self._rows(choosing, self._run)
        told, self._pages, load_RLE, self._progress, self._draft_BD, seen = program(self.weights, self._pages, *rows)
        self._loads.append(load_RLE)
        self._keep(seen)
        return told, width

    def _step_of(self, rows_B: np.ndarray, kind: str) -> tuple[int, str, int]:
        """Send which rows run; return of how many the program is, how it chooses, and how many drafts it has."""
        drafts = self._num_drafts if rows_B.sum() <= self._drafting_rows else 0
        return self._send_rows(rows_B), ANY if kind == BY_ID else kind, drafts

    def _rows(self, choosing: str, run_B: Any) -> tuple:
        """Return what a step reads and writes of the rows, of which `run_B` run."""
        rows = self._progress, self._draft_BD, self._settings, self._seen_by(choosing)
        return *rows, self._tables_BJ, run_B, self._loads[-1]

    def follow(self, packed: Packed, hidden_TD: jax.Array, next_R: np.ndarray) -> None:
        """Run the MTP layer over the pieces of a call."""
        program = self._program(("follow", len(packed.tokens_T) // self.sizes.devices))
        rows = self._draft_BD, self._progress, self._tables_BJ, packed, hidden_TD, next_R
        self._pages, self._draft_BD = program(self.weights, self._pages, *rows)

    def _names(self) -> list[tuple]:
        names: list[tuple] = [name for name in super()._names() if name[0] != "decode"]
        for width in self.widths:
            numbers = [self._num_drafts] if self._drafting_rows > 0 else []
            numbers += [0] if self._drafting_rows < width * self.sizes.devices else []
            steps = {1, self.burst} if width in self.burst_widths else {1}
            names += [("speculate", width, *rest) for rest in itertools.product(DRAFTING_KINDS, sorted(steps), numbers)]
        return names + [("follow", num_tokens) for num_tokens in self.sizes.buckets]

    def _speculate_program(self, width: int, choosing: str, num_steps: int, drafts: int):
        rows = self._rows(choosing, self._shape(bool, self.sizes.rows))
        static = self._model, self._decode_execution, Kind(drafts, width, choosing, num_steps, self._forced)
        donate = (1, 2, 3, 5) if reads_seen(choosing) else (1, 2, 3)
        return speculative.speculate, static, donate, (self.weights, self._pages, *rows)

    def _follow_program(self, num_tokens: int):
        pieces, most = self.sizes.devices * self.pieces, self.sizes.devices * self.sizes.prefill_tokens
        hidden_TD: Any = self._shape(compute_dtype(self._prefill_execution), most, self._model.width)
        rows = self._draft_BD, self._progress, self._tables_BJ, self._packed(num_tokens), hidden_TD
        arguments = self.weights, self._pages, *rows, self._shape(np.int32, pieces)
        static = self._model, self._prefill_execution, Rows(self.pieces, num_tokens)
        return following.follow_prefill, static, (1, 2), arguments
