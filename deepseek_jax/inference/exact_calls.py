"""The calls of a `DeviceBatch` in exact arithmetic: every token goes through the one program of `exact.pass_tile`."""

import dataclasses
from typing import Any

import jax
import numpy as np

from deepseek_jax.inference import exact
from deepseek_jax.inference.drafting import DRAFTING_KINDS, DraftingCalls
from deepseek_jax.inference.exact import TILE, Passed, Queries, Tiles
from deepseek_jax.inference.row_calls import Calls
from deepseek_jax.inference.row_programs import Packed, Told
from deepseek_jax.inference.row_sampling import KINDS, reads_seen
from deepseek_jax.inference.sampling import Logprobs
from deepseek_jax.inference.speculative import Kind
from deepseek_jax.model.moe import IN_BLOCKS
from deepseek_jax.parallel.program import jit_on


def open_calls(exactly: bool, common: Any, num_drafts: int, drafting_rows: int | None, forced: float | None) -> Calls:
    """Return the calls of a batch; `common` are the arguments of `Calls`.

    Raises:
        NotImplementedError: exact arithmetic, and not FP32 on one CPU.
    """
    model, executions, mesh, sizes, weights, burst = common
    drafting = num_drafts, drafting_rows, forced
    if not exactly:
        alike = model, executions, mesh, sizes, weights, burst
        return DraftingCalls(*alike, *drafting) if num_drafts else Calls(*alike)
    check_exact(executions[0].precision, mesh)
    executions = dataclasses.replace(executions[0], experts=IN_BLOCKS), executions[1]
    alike = model, executions, mesh, sizes, weights, 1
    return ExactDraftingCalls(*alike, *drafting) if num_drafts else ExactCalls(*alike)


def check_exact(precision: str, mesh: jax.sharding.Mesh) -> None:
    """Refuse exact arithmetic where it does not hold, or was never measured."""
    device = mesh.devices.flat[0]
    if precision != "fp32" or device.platform != "cpu" or mesh.devices.size > 1:
        raise NotImplementedError(
            f"exact arithmetic is for execution.precision = 'fp32' on one CPU device, and this is {precision!r} on"
            f" {mesh.devices.size} of {device.platform!r}: on a GPU the attention kernel cuts a row's pages by the"
            " lengths of all rows; use fast arithmetic"
        )


class ExactCalls(Calls):
    """Calls without drafts."""

    def __init__(self, *arguments: Any):
        """Begin as `Calls`."""
        super().__init__(*arguments)
        self.widths = [self.sizes.each]
        self._tiles: Tiles = []

    def prefill(self, packed: Packed) -> tuple[Any, jax.Array, jax.Array]:
        """Run pieces; return what `first` needs, the hidden states and the experts of all tokens."""
        num_tokens = len(packed.tokens_T)
        queries, self._progress = self._program(("prefill", num_tokens))(self._progress, packed)
        self._tiles = self._pass(queries, int(packed.new_R.sum()))
        return self._program(("gather", num_tokens))(self._tiles, packed.new_R)

    def first(self, kind: str, hidden_RD: Any, packed: Packed) -> Told:
        """Choose the tokens behind the last pieces; `hidden_RD` is what `prefill` returned."""
        arrays = self._progress, self._settings, self._seen_by(kind), hidden_RD, packed._replace(tokens_T=None)
        told, self._progress, seen = self._program(("first", kind))(*arrays)
        self._keep(seen)
        return told

    def evaluate(self, hidden_TD: jax.Array, following_T: np.ndarray, num_R: np.ndarray) -> Logprobs:
        """Return log-probabilities of the tokens that follow those of the last call of `prefill`."""
        return self._program(("score", len(self._tiles)))(self._tiles, following_T)

    def decode(self, rows_B: np.ndarray, kind: str, num_tokens: int) -> tuple[Told, int]:
        """Decode a token of each of these rows."""
        width = self._send_rows(rows_B)
        queries = self._program(("line_up",))(self._progress, self._run)
        tiles = self._pass(queries, int(np.flatnonzero(rows_B)[-1]) + 1)
        rows = self._progress, self._settings, self._seen_by(kind), self._run, tiles
        told, self._progress, seen = self._program(("decode", width, kind, num_tokens))(*rows)
        self._keep(seen)
        return told, width

    def _pass(self, queries: Queries, num_tokens: int) -> Tiles:
        """Run the first of the queries; tiles behind them repeat the last, and nobody reads them."""
        num_tiles, tiles = len(queries.row_T) // TILE, []
        for start in range(0, num_tokens, TILE):
            tile = self._program(("cut", num_tiles))(queries, np.int32(start))
            arrays = self.weights, self._pages, self._tables_BJ, tile, self._loads[-1]
            passed, self._pages, load_RLE = self._program(("tile",))(*arrays)
            self._loads.append(load_RLE)
            tiles.append(passed)
        return tiles + tiles[-1:] * (num_tiles - len(tiles))

    def _names(self) -> list[tuple]:
        names: list[tuple] = [("first", kind) for kind in KINDS]
        names += [("decode", self.sizes.each, kind, 1) for kind in KINDS]
        names += [(kind, num_tokens) for kind in ("prefill", "gather") for num_tokens in self.sizes.buckets]
        tiles = [-(-num_tokens // TILE) for num_tokens in self.sizes.buckets]
        names += [("score", num_tiles) for num_tiles in tiles]
        names += [("cut", num_tiles) for num_tiles in sorted({*tiles, *self._tiles_of_rows()})]
        return [*names, ("tile",), ("line_up",), ("update",), ("see",), ("copy",)]

    def _tiles_of_rows(self) -> list[int]:
        """Return how many tiles the rows of a step fill."""
        return [-(-self.sizes.each // TILE)]

    def _tile_program(self):
        arrays = self.weights, self._pages, self._tables_BJ, self._queries(1), self._loads[-1]
        return exact.pass_tile, (self._model, self._decode_execution), (1,), arrays

    def _cut_program(self, num_tiles: int):
        return exact.cut, (), (), (self._queries(num_tiles), self._shape(np.int32, split=False))

    def _prefill_program(self, num_tokens: int) -> Any:
        return exact.lay_out, (), (0,), (self._progress, self._packed(num_tokens))

    def _gather_program(self, num_tokens: int):
        tiles = self._passed(-(-num_tokens // TILE))
        return exact.gather, (self.sizes.prefill_tokens,), (), (tiles, self._packed(1).new_R)

    def _line_up_program(self):
        return exact.line_up, (), (), (self._progress, self._shape(bool, self.sizes.rows))

    def _first_program(self, kind: str) -> Any:
        behind = self._outputs(("gather", self.sizes.buckets[0]))[0]
        rest = behind, self._packed(1)._replace(tokens_T=None)
        arguments = self._progress, self._settings, self._seen_by(kind), *rest
        return exact.first, (kind,), (0, 2) if reads_seen(kind) else (0,), arguments

    def _score_program(self, num_tiles: int):
        following_T = self._shape(np.int32, self.sizes.prefill_tokens)
        return exact.evaluate, (self.sizes.prefill_tokens,), (), (self._passed(num_tiles), following_T)

    def _decode_program(self, width: int, kind: str, num_tokens: int) -> Any:
        rest = self._shape(bool, self.sizes.rows), self._passed(-(-width // TILE))
        arguments = self._progress, self._settings, self._seen_by(kind), *rest
        return exact.decode, (kind,), (0, 2) if reads_seen(kind) else (0,), arguments

    def _queries(self, num_tiles: int) -> Queries:
        shape = num_tiles * TILE
        leaves: Any = *(self._shape(np.int32, shape) for _ in range(3)), self._shape(bool, shape)
        return Queries(*leaves)

    def _passed(self, num_tiles: int) -> list[Passed]:
        return [self._outputs(("tile",))[0]] * num_tiles

    def _outputs(self, name: tuple) -> Any:
        """Return the shapes of what a program returns."""
        kind, *numbers = name
        function, static, _, arguments = getattr(self, f"_{kind}_program")(*numbers)
        with jax.set_mesh(self._mesh):
            found = jax.eval_shape(jit_on(function, self._decode_execution, self._mesh, *static), *arguments)
        return jax.tree.map(lambda x: self._shape(x.dtype, *x.shape), found)


class ExactDraftingCalls(ExactCalls, DraftingCalls):
    """Calls with drafts: proposed by a program, verified by tiles, settled by another program."""

    def decode(self, rows_B: np.ndarray, kind: str, num_tokens: int) -> tuple[Told, int]:
        """Decode tokens of each of these rows, in one step with drafts."""
        width, choosing, drafts = self._step_of(rows_B, kind)
        rows = self._rows(choosing, self._run)
        propose, settle = (self._program((name, choosing, drafts)) for name in ("propose", "settle"))
        proposed, queries, self._pages = propose(self.weights, self._pages, *rows)
        tiles = self._pass(queries, (int(np.flatnonzero(rows_B)[-1]) + 1) * (1 + drafts))
        told, self._pages, self._progress, self._draft_BD, seen = settle(
            self.weights, self._pages, proposed, tiles, *rows
        )
        self._keep(seen)
        return told, width

    def _names(self) -> list[tuple]:
        names = [name for name in ExactCalls._names(self) if name[0] not in ("decode", "line_up")]
        numbers = [self._num_drafts] if self._drafting_rows > 0 else []
        numbers += [0] if self._drafting_rows < self.sizes.rows else []
        pairs = [(kind, drafts) for kind in DRAFTING_KINDS for drafts in numbers]
        names += [(name, *pair) for name in ("propose", "settle") for pair in pairs]
        return names + [("follow", num_tokens) for num_tokens in self.sizes.buckets]

    def _tiles_of_rows(self) -> list[int]:
        return [-(-self.sizes.each * (1 + drafts) // TILE) for drafts in (0, self._num_drafts)]

    def _static(self, choosing: str, drafts: int) -> tuple:
        kind = Kind(drafts, self.sizes.each, choosing, 1, self._forced)
        return self._model, self._decode_execution, kind

    def _propose_program(self, choosing: str, drafts: int):
        arrays = self.weights, self._pages, *self._rows(choosing, self._shape(bool, self.sizes.rows))
        return exact.propose, self._static(choosing, drafts), (1,), arrays

    def _settle_program(self, choosing: str, drafts: int):
        proposed = self._outputs(("propose", choosing, drafts))[0]
        tiles = self._passed(-(-self.sizes.each * (1 + drafts) // TILE))
        donate = (1, 4, 5, 7) if reads_seen(choosing) else (1, 4, 5)
        rows = self._rows(choosing, self._shape(bool, self.sizes.rows))
        arrays = self.weights, self._pages, proposed, tiles, *rows
        return exact.settle, self._static(choosing, drafts), donate, arrays
