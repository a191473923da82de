"""The compiled programs of a `DeviceBatch`, and the arrays that they pass from one to the next.

A program is made for sizes that no job changes: some of the rows or all, greedy or not; a few numbers of tokens in
prefill. So all can be compiled before the first job. Arrays of the host go along as NumPy, which costs a few
microseconds each; an array that stays as it was is not sent again. No call waits for the device.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Execution, Model
from deepseek_jax.inference import row_programs, row_state
from deepseek_jax.inference.cache import CACHE_SPECS, copy_pages
from deepseek_jax.inference.decode import GPU_ROWS
from deepseek_jax.inference.memory import free_bytes
from deepseek_jax.inference.row_programs import Packed, Told
from deepseek_jax.inference.row_sampling import KINDS, WORD, reads_seen
from deepseek_jax.inference.row_state import Sizes
from deepseek_jax.inference.sampling import Logprobs
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.parameters import ROWS, P, Weights
from pallas_kernels.mla_decode.schedule import PAGE

MOST_COPIES = 8  # pages that a call copies
# Tokens of a row in a burst on a GPU. For one row a step of configs/v3_5b.py is 1.1 ms of an H200, and dispatching it
# took 1.4 ms of the host (2026-11-29); with four in one dispatch the device has always work.
BURST_ON_GPU = 4
MOST_PIECES, MOST_PIECES_OF_CUDNN = 16, 4  # of a device in a call of prefill; cuDNN fills each up to a whole call
FEW_ROWS_ON_CPU = 4
MOST_LOADS = 16  # calls in flight, about
MOST_COMPILERS = 8  # programs that are compiled at once; a compiler of a large model takes gigabytes of the host
LOWERING = threading.Lock()  # lowering is Python, so threads gain nothing, and would lower the same kernel twice


class Calls:
    """Weights, pages and rows on the devices, and the programs on them."""

    def __init__(
        self,
        model: Model,
        executions: tuple[Execution, Execution],
        mesh: jax.sharding.Mesh,
        sizes: Sizes,
        weights: Weights,
        burst: int | None = None,
    ):
        """Make an empty cache and closed rows; `executions` are of decoding and of prefill, `weights` are placed.

        Bursts have `burst` tokens of a row; by default `BURST_ON_GPU` there, and elsewhere there are none.
        """
        self.weights: Any = weights
        self.sizes = sizes
        self._model, self._mesh = model, mesh
        self._decode_execution, self._prefill_execution = executions
        is_gpu = mesh.devices.flat[0].platform == "gpu"
        self.widths = sorted({min(GPU_ROWS if is_gpu else FEW_ROWS_ON_CPU, sizes.each), sizes.each})
        self.burst = (BURST_ON_GPU if is_gpu else 1) if burst is None else burst
        most_pieces = MOST_PIECES_OF_CUDNN if executions[1].attention == "cudnn" else MOST_PIECES
        self.pieces = min(most_pieces, sizes.each)
        self.num_words = -(-weights.params["head_DV"].shape[1] // WORD)
        self._split, self._whole = (jax.NamedSharding(mesh, spec) for spec in (P(ROWS), P()))
        with jax.set_mesh(mesh):
            num_layers = model.num_layers + len(weights.params.get("mtp_layers", ()))  # where tokens are drafted
            shape = num_layers, sizes.devices * sizes.pages, PAGE, model.kv_latent + model.rotary_dim
            dtype = compute_dtype(executions[0])
            split: Any = CACHE_SPECS.pages
            self._pages = jnp.zeros(shape, dtype, out_sharding=split)
        state = row_state.empty_state(sizes.rows, weights.params["head_DV"].shape[1])
        # A donated array must not be the memory of another one.
        state = jax.tree.map(lambda x: jax.device_put(np.array(x), self._split), state)
        self._progress, self._settings, self._seen = state
        self._no_words = jax.device_put(np.zeros((row_state.MOST_RECORDS, 2, self.num_words), np.int32), self._whole)
        self._run, self._run_bytes = None, b""
        load_RLE = np.zeros((sizes.devices, len(weights.params.get("moe_layers", ())), model.num_experts), np.int32)
        # Never donated: any thread may read the last that is ready.
        self._loads = deque([jax.device_put(load_RLE, self._split)], MOST_LOADS)
        self.set_tables(np.zeros((sizes.rows, sizes.columns), np.int32))
        self._programs: dict[tuple, Any] = {}

    def compile(self, progress: Callable[[int, int], None] | None, kinds: Sequence[str]) -> None:
        """Compile all programs that are not compiled yet: one is lowered while others are compiled."""
        left_out = set(KINDS) - set(kinds)
        names = [name for name in self._names() if name[0] not in ("decode", "first") or not left_out & set(name)]
        compilers = ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1), thread_name_prefix="compile")
        try:
            running = [compilers.submit(self._program, name) for name in names]
            for i, compiled in enumerate(as_completed(running)):
                compiled.result()
                if progress is not None:
                    progress(i + 1, len(names))
        finally:  # after an error or Ctrl-C, only those that have begun are waited for
            compilers.shutdown(cancel_futures=True)

    @property
    def burst_widths(self) -> list[int]:
        """The first rows of each device, of which there are programs for bursts; the fewest first."""
        return self.widths if self.sizes.bulk else self.widths[:1]

    def _names(self) -> list[tuple]:
        names: list[tuple] = [("first", kind) for kind in KINDS]
        names += [("decode", width, kind, 1) for width in self.widths for kind in KINDS]
        widths = self.burst_widths if self.burst > 1 else []
        names += [("decode", width, kind, self.burst) for width in widths for kind in KINDS]
        names += [("prefill", num_tokens) for num_tokens in self.sizes.buckets]
        return [*names, ("evaluate",), ("update",), ("see",), ("copy",)]

    def set_tables(self, tables_BJ: np.ndarray) -> None:
        """Send the pages of all rows."""
        self._tables_BJ = jax.device_put(tables_BJ.copy(), self._split)

    def update(self, records_U: np.ndarray, words_U2W: np.ndarray | None) -> None:
        """Write records, and masks where there are any, into their rows."""
        records_UX = records_U.view(np.int32).reshape(len(records_U), -1)
        words = self._no_words if words_U2W is None else words_U2W
        self._progress, self._settings = self._program(("update",))(self._progress, self._settings, records_UX, words)

    def see(self, row: int, prompt: np.ndarray, output: np.ndarray) -> None:
        """Let a row have seen its prompt and its output."""
        ids_M = np.zeros(self.sizes.positions, np.int32)
        num_prompt, num_tokens = len(prompt), len(prompt) + len(output)
        ids_M[:num_prompt], ids_M[num_prompt:num_tokens] = prompt, output
        numbers = (np.int32(number) for number in (row, num_prompt, num_tokens))
        self._seen = self._program(("see",))(self._seen, ids_M, *numbers)

    def change_pages(self, change: Callable[[jax.Array], jax.Array]) -> None:
        """Put what `change` makes of the pages in their place."""
        with jax.set_mesh(self._mesh):
            self._pages = change(self._pages)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages: (device, source, target) of each."""
        for start in range(0, len(copies), MOST_COPIES):
            part = copies[start : start + MOST_COPIES]
            copies_U3 = np.full((MOST_COPIES, 3), -1, np.int32)
            copies_U3[: len(part)] = part
            self._pages = self._program(("copy",))(self._pages, copies_U3)

    def prefill(self, packed: Packed) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Run pieces; return the hidden states behind each, those of all tokens, and the experts of all tokens."""
        program = self._program(("prefill", len(packed.tokens_T) // self.sizes.devices))
        arrays = self.weights, self._pages, self._progress, self._tables_BJ, packed, self._loads[-1]
        hidden_RD, hidden_TD, routes_TLK, self._pages, self._progress, load_RLE = program(*arrays)
        self._loads.append(load_RLE)
        return hidden_RD, hidden_TD, routes_TLK

    def first(self, kind: str, hidden_RD: jax.Array, packed: Packed) -> Told:
        """Choose the tokens behind the last pieces, whose rows are of `kind`."""
        rows = self._progress, self._settings, self._seen_by(kind)
        arrays = self._head, *rows, hidden_RD, packed._replace(tokens_T=None)
        told, self._progress, seen = self._program(("first", kind))(*arrays)
        self._keep(seen)
        return told

    def follow(self, packed: Packed, hidden_TD: jax.Array, next_R: np.ndarray) -> None:
        """Do what comes after a call of prefill and its first tokens: nothing, where nothing is drafted."""

    def evaluate(self, hidden_TD: jax.Array, following_T: np.ndarray, num_R: np.ndarray) -> Logprobs:
        """Return log-probabilities of the tokens that follow the first `num_R` tokens of each device."""
        return self._program(("evaluate",))(self._head, hidden_TD, following_T, num_R)

    def decode(self, rows_B: np.ndarray, kind: str, num_tokens: int) -> tuple[Told, int]:
        """Decode tokens of each of these rows; return what is told of the first rows of each device, and how many."""
        width = self._send_rows(rows_B)
        program = self._program(("decode", width, kind, num_tokens))
        rows = self._progress, self._settings, self._seen_by(kind), self._tables_BJ, self._run, self._loads[-1]
        told, self._pages, self._progress, seen, load_RLE = program(self.weights, self._pages, *rows)
        self._loads.append(load_RLE)
        self._keep(seen)
        return told, width

    def _seen_by(self, kind: str) -> row_state.Seen | None:
        """Return what the rows have seen, for programs that choose tokens by it; None for others."""
        return self._seen if reads_seen(kind) else None

    def _keep(self, seen: row_state.Seen | None) -> None:
        """Keep what such a program has made of it."""
        self._seen = self._seen if seen is None else seen

    def _send_rows(self, rows_B: np.ndarray) -> int:
        """Send which rows run; return of how many the program is."""
        if self._run_bytes != (key := rows_B.tobytes()):
            self._run, self._run_bytes = jax.device_put(rows_B.copy(), self._split), key
        most = int(rows_B.reshape(self.sizes.devices, -1).any(axis=0).nonzero()[0][-1]) + 1
        return self.widths[0] if most <= self.widths[0] else self.widths[-1]

    def expert_load(self) -> np.ndarray:
        """Return how many tokens each expert of each MoE layer has had, as far as the device has come."""
        loads = list(self._loads)
        load_RLE = next((load for load in reversed(loads) if load.is_ready()), loads[0])
        return np.asarray(load_RLE).view(np.uint32).sum(axis=0, dtype=np.int64)

    def update_weights(self, weights: Weights) -> None:
        """Place other weights; the old ones go first where there is no room for both."""
        drafts = "mtp_layers" in self.weights.params
        place = functools.partial(decode_weights, self._model, self._decode_execution, mesh=self._mesh, drafts=drafts)
        with jax.set_mesh(self._mesh):
            old, new = (dict(_kinds(tree)) for tree in (self.weights, jax.eval_shape(place, weights)))
            other = next((name for name in old.keys() | new.keys() if old.get(name) != new.get(name)), None)
            if other is not None:
                raise ValueError(
                    f"weight {other} is {new.get(other)} where {old.get(other)} is decoded: other shapes or dtypes need"
                    " an engine of their own"
                )
            is_tight = free_bytes(self._mesh) < sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))
            if is_tight:
                self.weights = None  # arrays that nobody else holds are freed when the last step that reads them ends
            self.weights = place(weights)

    @property
    def _head(self) -> jax.Array:
        return self.weights.params["head_DV"]

    def _program(self, name: tuple) -> Any:
        found = self._programs.get(name)
        if found is None:
            kind, *numbers = name
            function, static, donate, arguments = getattr(self, f"_{kind}_program")(*numbers)
            prefills = kind in ("prefill", "follow")
            execution = self._prefill_execution if prefills else self._decode_execution
            with LOWERING, jax.set_mesh(self._mesh):
                jitted: Any = jit_on(function, execution, self._mesh, *static, donate=donate, cublas=prefills)
                lowered = jitted.lower(*arguments)
            found = self._programs[name] = lowered.compile()
        return found

    def _decode_program(self, width: int, kind: str, num_tokens: int) -> Any:
        run_B = self._shape(bool, self.sizes.rows)
        rest = self._settings, self._seen_by(kind), self._tables_BJ, run_B, self._loads[-1]
        arguments = self.weights, self._pages, self._progress, *rest
        donate = (1, 2, 4) if reads_seen(kind) else (1, 2)
        static = self._model, self._decode_execution, width, kind, num_tokens
        return row_programs.decode, static, donate, arguments

    def _prefill_program(self, num_tokens: int) -> Any:
        static = self._model, self._prefill_execution, Rows(self.pieces, num_tokens), self.sizes.prefill_tokens
        rows = self._progress, self._tables_BJ, self._packed(num_tokens), self._loads[-1]
        return row_programs.prefill, static, (1, 2), (self.weights, self._pages, *rows)

    def _first_program(self, kind: str) -> Any:
        pieces, dtype = self.sizes.devices * self.pieces, compute_dtype(self._prefill_execution)
        rest = self._shape(dtype, pieces, self._model.width), self._packed(1)._replace(tokens_T=None)
        arguments = self._head, self._progress, self._settings, self._seen_by(kind), *rest
        return row_programs.first, (kind,), (1, 3) if reads_seen(kind) else (1,), arguments

    def _evaluate_program(self):
        num_tokens = self.sizes.devices * self.sizes.prefill_tokens
        hidden_TD = self._shape(compute_dtype(self._prefill_execution), num_tokens, self._model.width)
        numbers = self._shape(np.int32, num_tokens), self._shape(np.int32, self.sizes.devices)
        return row_programs.evaluate, (), (), (self._head, hidden_TD, *numbers)

    def _update_program(self):
        records_UX = self._shape(np.int32, row_state.MOST_RECORDS, row_state.NUM_WORDS, split=False)
        return row_state.update, (), (0, 1), (self._progress, self._settings, records_UX, self._no_words)

    def _see_program(self):
        ids_M, number = self._shape(np.int32, self.sizes.positions, split=False), self._shape(np.int32, split=False)
        return row_state.see, (), (0,), (self._seen, ids_M, number, number, number)

    def _copy_program(self):
        return copy_pages, (), (0,), (self._pages, self._shape(np.int32, MOST_COPIES, 3, split=False))

    def _packed(self, num_tokens: int) -> Packed:
        devices, pieces = self.sizes.devices, self.sizes.devices * self.pieces
        ints = functools.partial(self._shape, np.int32)
        shapes: Any = ints(devices * num_tokens), ints(pieces), ints(pieces), self._shape(bool, pieces)
        return Packed(*shapes)

    def _shape(self, dtype: Any, *shape: int, split: bool = True) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._split if split else self._whole)


def _kinds(weights: Weights) -> Iterator[tuple[str, str]]:
    """Yield the name of each weight, and its dtype and shape."""
    for path, leaf in jax.tree.leaves_with_path(weights):
        yield jax.tree_util.keystr(path), f"{leaf.dtype}{list(leaf.shape)}"
