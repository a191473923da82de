"""The device's side of the engine: rows that open and close while others decode, over one cache of pages.

    batch = DeviceBatch(config, weights, mesh, num_rows=128, num_pages=20_000, num_positions=4096, eos=1)
    batch.compile()
    batch.open_row(3, RowSettings(sampling=sampling, max_new_tokens=100))
    batch.set_table(3, table)                              # room for what the next step writes
    step = batch.step([Piece(3, ids, is_last=True)], rows_B)  # returns at once
    result = step.read()                                   # waits: the first token of row 3, one of each row of rows_B

Which pages a row has is for the host to decide (`pages.PagedSequence`). Last tokens, lengths, what is left, and what
has ended stay on the device. So a step can be dispatched before the one before it is read: a row that has ended takes
no part in it, and writes nothing.

What the host changes between steps (rows that open or close, tables, masks, copies) is kept here and sent with the next
step, a few rows in one small array. Programs are compiled for shapes that no job changes (`row_calls.Calls`).
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.inference import batch_checks as checks
from deepseek_jax.inference.cache import cache_bytes_per_token
from deepseek_jax.inference.cache import num_pages as pages_of
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.decode import num_rows as rows_of_batch
from deepseek_jax.inference.drafting import check_drafts
from deepseek_jax.inference.exact_calls import ExactCalls, open_calls
from deepseek_jax.inference.job import Job
from deepseek_jax.inference.pages import Copy
from deepseek_jax.inference.prefill import prefill_execution
from deepseek_jax.inference.row_sampling import KINDS
from deepseek_jax.inference.row_state import (
    MASK,
    MOST_RECORDS,
    SETTINGS,
    RowSettings,
    Sizes,
    closed_records,
    write_record,
)
from deepseek_jax.inference.sampling import NO_TOKEN
from deepseek_jax.inference.step import Call, Masks, Piece, Step, pack
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import ROWS, Weights


class DeviceBatch:
    """Weights, pages and rows on the devices of a mesh, and the programs of a step.

    Attributes:
        num_rows: at least as many as were asked for: each device has as many, and a GPU a multiple of 16.
        num_devices: that rows are split over. Device d has the rows from d * num_rows / num_devices on, and `num_pages`
            pages of its own; page numbers are those on the row's device.
        num_pages: of each device.
        num_columns: of a row's table, J.
        most_prefill_tokens: of a device in a step.
        most_pieces: of a device in a call of prefill; a step with more makes several calls.
        burst: tokens that a row gets of one step (`step`) unless it ends; 1 where there are no bursts.
        burst_rows: the first rows of each device, which alone may have bursts; all with `bulk`.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        mesh: jax.sharding.Mesh,
        *,
        num_rows: int,
        num_pages: int,
        num_positions: int,
        eos: int,
        most_prefill_tokens: int = 2048,
        num_drafts: int = 0,
        drafting_rows: int | None = None,
        forced: float | None = None,
        burst: int | None = None,
        exact: bool = False,
        bulk: bool = False,
    ):
        """Place weights and an empty cache.

        Args:
            config: model and execution.
            weights: as the training state has them, or in FP8; the head may lack ids that no token has.
            mesh: the mesh that decodes.
            num_rows: jobs that run at once, at least.
            num_pages: of each device, 64 tokens each.
            num_positions: of the longest row: prompt and new tokens.
            eos: ends every row that does not ignore it.
            most_prefill_tokens: of a device in a step; a power of two from 128 on.
            num_drafts: tokens that the MTP layer drafts for each row, up to 3.
            drafting_rows: it drafts while at most so many rows decode (`acceptance.worth_rows`); by default always.
            forced: accept each draft with this probability, for benchmarks with random weights.
            burst: tokens of a row in a step without the host, with drafts at least; by default 4 on a GPU, 1 elsewhere.
            exact: log-probabilities of tokens do not depend on what else runs (`inference.exact`).
            bulk: callers wait for whole answers (`inference.scheduler`): bursts are for all rows.

        Raises:
            ValueError: sizes out of range, or a cache that the devices cannot hold.
        """
        checks.check_sizes(num_rows, num_pages, num_positions, most_prefill_tokens)
        check_drafts(num_drafts, config.model)
        checks.check_burst(burst)
        self.num_devices, self.num_rows, self.bulk = axis_size(mesh, ROWS), rows_of_batch(num_rows, mesh), bulk
        self.num_columns, self.most_prefill_tokens = pages_of(num_positions + num_drafts), most_prefill_tokens
        self.num_pages, self.num_positions, self.num_drafts = num_pages, num_positions, num_drafts
        model, executions = config.model, (decode_execution(config, mesh), prefill_execution(config, mesh))
        sizes = Sizes(self.num_devices, self.num_rows, num_pages, self.num_columns, num_positions, most_prefill_tokens)
        checks.check_pages(cache_bytes_per_token(model, executions[0], num_drafts > 0), num_pages, mesh)
        with jax.set_mesh(mesh):
            placed = decode_weights(model, executions[0], weights, mesh, num_drafts > 0)
        common = model, executions, mesh, sizes._replace(bulk=bulk), placed, burst
        calls = self._calls = open_calls(exact, common, num_drafts, drafting_rows, forced)
        self.most_pieces, self.burst, self.burst_rows = calls.pieces, calls.burst, calls.burst_widths[-1]
        self.vocab_size, self._mesh, self._eos = placed.params["head_DV"].shape[1], mesh, eos
        self._tables_BJ, self._tables_changed = np.zeros((self.num_rows, self.num_columns), np.int32), False
        self._open: dict[int, RowSettings] = {}
        self._kind_B, self._wants_B, self._routes_B = np.zeros((3, self.num_rows), np.int8)
        self._changed: dict[int, RowSettings | None] = {}  # since the last step; None: closed
        self._masks: dict[int, Masks] = {}
        self._copies: list[tuple[int, int, int]] = []

    def compile(self, progress: Callable[[int, int], None] | None = None, kinds: Sequence[str] = KINDS) -> None:
        """Compile all programs, at most 23, or 32 with drafts; later none is compiled.

        `progress(done, all)` is called after each. Without drafts, `kinds` of choosing can be fewer than all (`KINDS`).
        """
        self._calls.compile(progress, kinds)

    def device_of(self, row: int) -> int:
        """Return the number of the device that has a row, whose pages the row's table means."""
        return row * self.num_devices // self.num_rows

    def check(self, job: Job) -> None:
        """Refuse, with a ValueError, what no row can do."""
        checks.check_job(job, self.vocab_size, isinstance(self._calls, ExactCalls))

    def expert_load(self) -> np.ndarray:
        """Return how many tokens each expert of each MoE layer has had, int64 [L, E], from any thread.

        Rejected drafts count, the MTP layer does not. Steps in flight are left out. Counts begin anew at 2**32.
        """
        return self._calls.expert_load()

    def open_row(self, row: int, settings: RowSettings) -> None:
        """Begin a job in a closed row; it is on the device with the next step.

        Raises:
            ValueError: the row is open, or the bias has an id that is no token, or more ids than a row can have.
        """
        if row in self._open or not 0 <= row < self.num_rows:
            raise ValueError(f"row {row} is open, or none of the {self.num_rows} rows; close it first")
        checks.check_own(settings.own, self.vocab_size)
        self._open[row] = self._changed[row] = settings
        self._kind_B[row], self._routes_B[row] = KINDS.index(settings.kind), settings.routes
        self._wants_B[row] = 2 if settings.kept else settings.wants_logprobs

    def close_row(self, row: int) -> None:
        """Let a row's job go, whether it has ended or not; nothing is written for it from the next step on."""
        if self._open.pop(row, None) is not None:
            self._changed[row] = None
            self._masks.pop(row, None)

    def set_table(self, row: int, table: Sequence[int] | np.ndarray) -> None:
        """Give a row the pages `table`, in order, from the next step on."""
        if len(table) > self.num_columns:
            raise ValueError(f"a table of {len(table)} pages is longer than the {self.num_columns} of a row")
        self._tables_BJ[row, : len(table)] = table
        self._tables_changed = True

    def copy_pages(self, row: int, copies: Sequence[Copy]) -> None:
        """Copy pages of the row's device, in their order, before the next step writes."""
        device = self.device_of(row)
        self._copies += [(device, copy.source, copy.target) for copy in copies]

    def set_mask(
        self, row: int, words_W: np.ndarray, draft: int = NO_TOKEN, behind_W: np.ndarray | None = None
    ) -> None:
        """Say which tokens may be chosen next for a `masked` row: bit i of int32 word w is token 32 w + i.

        Where the batch drafts, the row may have a draft, and the mask of the token behind it.
        """
        if row not in self._open or not self._open[row].masked:
            raise ValueError(f"row {row} is not open with `masked`; say so in its settings")
        words_2W = np.array([words_W, np.zeros_like(words_W) if behind_W is None else behind_W], np.int32)
        if words_2W.shape != (2, self._calls.num_words):
            raise ValueError(f"a mask has shape {words_2W.shape[1:]}; {self._calls.num_words} words are all tokens")
        self._masks[row] = Masks(words_2W, NO_TOKEN if behind_W is None else draft)

    def change_pages(self, change: Callable[[jax.Array], jax.Array]) -> None:
        """Put what `change` makes of the pages [L, pages, 64, C + R] in their place: contexts for benchmarks."""
        self._calls.change_pages(change)

    def step(self, pieces: Sequence[Piece], rows_B: np.ndarray, num_tokens: int = 1) -> Step:
        """Dispatch a step, and return at once.

        Args:
            pieces: prompts, at most one piece of a row, and `most_prefill_tokens` of a device in all. Those that are
                the last give the first token.
            rows_B: bool, rows that decode: for which a token has been chosen, perhaps in a step that is not read yet.
                A row that has ended takes no part. A row may not be in `pieces`, too.
            num_tokens: of each of these rows, 1 or `burst`; with drafts up to `num_drafts` more of each.

        Raises:
            ValueError: too many tokens; a row that is not open, or is in both; a masked row without a new mask; a burst
                of rows that can have none.
        """
        decoding = np.flatnonzero(rows_B)
        choosing = self._check(pieces, decoding)
        if num_tokens != 1:
            behind = decoding[decoding % (self.num_rows // self.num_devices) >= self.burst_rows].tolist()
            checks.check_burst_step(num_tokens, self.burst, behind, [r for r in choosing if self._open[r].masked])
        self._send(choosing)
        step = Step(self.num_rows, num_tokens * (1 + self.num_drafts))
        for call in pack(pieces, self._calls.sizes, self._calls.pieces):
            self._prefill(step, call)
        if len(decoding):
            told, width = self._calls.decode(rows_B, KINDS[self._kind_B[decoding].max()], num_tokens)
            device, local = np.divmod(decoding, self.num_rows // self.num_devices)
            routed = decoding[self._routes_B[decoding] > 0]
            step.tell(told, decoding, device * width + local, int(self._wants_B[decoding].max()), routed)
        return step

    def update_weights(self, weights: Weights) -> None:
        """Go on with other weights of the same shapes; the next step is the first with them.

        What the pages of open rows have stays: close them first, and forget the prefixes (`PagePool.forget`). Where
        both do not fit, the old ones go first.

        Raises:
            ValueError: other shapes. Nothing has changed then.
        """
        self._calls.update_weights(weights)

    def _prefill(self, step: Step, call: Call) -> None:
        """Dispatch a call of prefill, and what is wanted of it."""
        hidden_RD, hidden_TD, routes_TLK = self._calls.prefill(call.packed)
        if routed := {row: span for row, span in call.tokens.items() if self._routes_B[row]}:
            step.route(routes_TLK, routed)
        if call.last_rows.size:
            kind = KINDS[self._kind_B[call.last_rows].max()]
            told = self._calls.first(kind, hidden_RD, call.packed)
            step.tell(
                told, call.last_rows, call.last_places, int(self._wants_B[call.last_rows].max()), call.last_rows[:0]
            )
        self._calls.follow(call.packed, hidden_TD, call.next_R)
        if call.spans:
            step.evaluate(self._calls.evaluate(hidden_TD, call.following_T, call.num_R), call.spans)

    def _check(self, pieces: Sequence[Piece], decoding: np.ndarray) -> list[int]:
        """Refuse what a step cannot do, before anything is sent; return the rows that choose a token."""
        prefilled = [piece.row for piece in pieces]
        rows = [*prefilled, *decoding.tolist()]
        if len(set(rows)) < len(rows) or not self._open.keys() >= set(rows):
            raise ValueError(f"rows {rows} of a step must be open, and each in one place")
        choosing = [piece.row for piece in pieces if piece.is_last] + decoding.tolist()
        bare = [row for row in choosing if self._open[row].masked and row not in self._masks]
        if bare:
            raise ValueError(f"rows {bare} are masked; call set_mask before each of their steps")
        checks.check_pieces(pieces, [self.device_of(row) for row in prefilled], self.most_prefill_tokens)
        return choosing

    def _send(self, choosing: Sequence[int]) -> None:
        """Send what the host has changed since the last step, and the masks of rows that choose."""
        self._calls.copy(self._copies)
        self._copies = []
        if self._tables_changed:
            self._calls.set_tables(self._tables_BJ)
            self._tables_changed = False
        masks = {row: self._masks.pop(row) for row in choosing if row in self._masks} if self._masks else {}
        rows = list(self._changed.keys() | masks.keys())
        for start in range(0, len(rows), MOST_RECORDS):
            self._update(rows[start : start + MOST_RECORDS], masks)
        for row, settings in self._changed.items():
            if settings is not None and settings.sampling.penalizes:
                self._calls.see(row, np.asarray(settings.prompt), np.asarray(settings.output))
        self._changed = {}

    def _update(self, rows: Sequence[int], masks: dict[int, Masks]) -> None:
        records = closed_records(MOST_RECORDS)
        words_U2W = np.zeros((MOST_RECORDS, 2, self._calls.num_words), np.int32) if masks else None
        for i, row in enumerate(rows):
            record = records[i]
            record["row"] = row
            if row in self._changed:
                record["writes"] = SETTINGS
                if (settings := self._changed[row]) is not None:
                    write_record(record, settings, self._eos)
            if words_U2W is not None and row in masks:
                record["writes"] |= MASK
                words_U2W[i], record["draft"] = masks[row]
        self._calls.update(records, words_U2W)
