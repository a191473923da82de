"""What goes into a step of a `DeviceBatch`, and what comes out of it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.inference.row_calls import Sizes
from deepseek_jax.inference.row_programs import Packed, Told
from deepseek_jax.inference.sampling import MOST_LOGPROBS, Logprobs


class Piece(NamedTuple):
    """Tokens of a row's prompt that go through the model behind those that went before.

    Attributes:
        row: its number.
        ids: at least one.
        is_last: the first new token is chosen after these.
        logprobs: log-probabilities are wanted of the tokens that follow each of these.
        following: with `logprobs`, the token behind the piece, where the prompt has one.
    """

    row: int
    ids: Sequence[int]
    is_last: bool
    logprobs: bool = False
    following: int | None = None


class Call(NamedTuple):
    """Pieces that go through the model together, of R places a device.

    Attributes:
        packed: of all devices, one behind the other.
        last_rows: rows whose first token follows.
        last_places: theirs among the R of all devices.
        spans: rows that want log-probabilities, and the tokens of all devices that theirs follow.
        following_T: of `most_tokens` a device, the token behind each that is wanted.
        num_R: of each device, the tokens up to the last that is wanted.
    """

    packed: Packed
    last_rows: np.ndarray
    last_places: np.ndarray
    spans: list[tuple[int, slice]]
    following_T: np.ndarray
    num_R: np.ndarray


class StepResult(NamedTuple):
    """What a step made; all NumPy.

    Attributes:
        tokens_BK: int32 new tokens of each row; K is 1, or 1 + `num_drafts`. `sampling.NO_TOKEN` where the logits were
            not numbers: the row has ended.
        counts_B: int32, how many of them are there; 0 where none was chosen, or the row had ended before.
        finished_B: bool, rows of the step that have ended by themselves, now or before: the last token is an end id,
            the last of `max_new_tokens`, or `NO_TOKEN`. A prompt after which nothing is wanted ends without a token.
        logprobs: of new tokens, [B, K] and [B, K, `MOST_LOGPROBS`], where a row of the step asks for them.
        prompt_logprobs: by row, of pieces that ask: [n] and [n, `MOST_LOGPROBS`], for the tokens behind each of a
            piece's, n its tokens, or one less if nothing follows.
        routes: by row, experts of the tokens that went through the model, [n, MoE layers, K].
        drafted_B: drafts that were verified of each row.
    """

    tokens_BK: np.ndarray
    counts_B: np.ndarray
    finished_B: np.ndarray
    logprobs: Logprobs | None
    prompt_logprobs: dict[int, Logprobs]
    routes: dict[int, np.ndarray] = {}
    drafted_B: np.ndarray | None = None


class Step:
    """A step on its way: arrays of the device that nothing changes any more, and whose they are."""

    def __init__(self, num_rows: int, num_tokens: int):
        """Begin with nothing of `num_rows` rows, of which each may get `num_tokens`."""
        self._shape = num_rows, num_tokens
        self._told: list[tuple[Told, np.ndarray, np.ndarray, bool]] = []
        self._evaluated: list[tuple[Logprobs, int, slice]] = []
        self._result: StepResult | None = None

    def tell(self, told: Told, rows_X: np.ndarray, places_X: np.ndarray, wants_logprobs: bool) -> None:
        """Have what the entries `places_X` say of the rows `rows_X`."""
        for leaf in told if wants_logprobs else told[:1]:
            _begin_reading(leaf)
        self._told.append((told, rows_X, places_X, wants_logprobs))

    def evaluate(self, logprobs: Logprobs, spans: Sequence[tuple[int, slice]]) -> None:
        """Have log-probabilities of prompts: each row's in its slice."""
        _begin_reading(logprobs)
        self._evaluated += [(logprobs, row, span) for row, span in spans]

    def read(self) -> StepResult:
        """Wait for the step, and return what it made; a second call returns the same."""
        if self._result is None:
            self._result = self._read()
            self._told, self._evaluated = [], []
        return self._result

    def _read(self) -> StepResult:
        num_rows, num_tokens = self._shape
        tokens_BK, counts_B = np.zeros((num_rows, num_tokens), np.int32), np.zeros(num_rows, np.int32)
        finished_B, logprobs = np.zeros(num_rows, bool), None
        for told, rows_X, places_X, wants_logprobs in self._told:
            numbers = np.asarray(told.numbers_BX)[places_X]
            tokens_BK[rows_X], counts_B[rows_X], finished_B[rows_X] = (
                numbers[:, :-2],
                numbers[:, -2],
                numbers[:, -1] > 0,
            )
            if wants_logprobs:
                logprobs = logprobs or _empty(num_rows, num_tokens)
                for whole, part in zip(logprobs, told.logprobs, strict=True):
                    whole[rows_X] = np.asarray(part)[places_X].reshape(-1, *whole.shape[1:])
        prompts = {row: Logprobs(*(np.asarray(leaf)[span] for leaf in found)) for found, row, span in self._evaluated}
        return StepResult(tokens_BK, counts_B, finished_B, logprobs, prompts)


def _begin_reading(tree) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()


def _empty(*shape: int) -> Logprobs:
    """Return log-probabilities of tokens of `shape`, all 0."""
    tops = (np.zeros((*shape, MOST_LOGPROBS), dtype) for dtype in (np.int32, np.float32))
    return Logprobs(np.zeros(shape, np.float32), *tops)


def pack(pieces: Sequence[Piece], sizes: Sizes, num_places: int) -> list[Call]:
    """Pack pieces into calls, each device's in their order, at most `num_places` of a device in a call."""
    queues: list[list[Piece]] = [[] for _ in range(sizes.devices)]
    for piece in pieces:
        queues[piece.row // sizes.each].append(piece)
    starts = range(0, max(map(len, queues)), num_places)
    return [_call([queue[start : start + num_places] for queue in queues], sizes, num_places) for start in starts]


def _call(queues: list[list[Piece]], sizes: Sizes, num_places: int) -> Call:
    most = max(sum(len(piece.ids) for piece in queue) for queue in queues)
    num_tokens = next(bucket for bucket in sizes.buckets if bucket >= most)
    tokens_RT = np.zeros((sizes.devices, num_tokens), np.int32)
    row_RP = np.full((sizes.devices, num_places), sizes.each, np.int32)
    new_RP, last_RP = np.zeros_like(row_RP), np.zeros(row_RP.shape, bool)
    following_RT, num_R = np.zeros((sizes.devices, sizes.prefill_tokens), np.int32), np.zeros(sizes.devices, np.int32)
    spans, last_rows = [], []
    for device, queue in enumerate(queues):
        start = 0
        for place, (row, ids, is_last, logprobs, following) in enumerate(queue):
            end = start + len(ids)
            tokens_RT[device, start:end] = ids
            row_RP[device, place], new_RP[device, place] = row - device * sizes.each, len(ids)
            last_RP[device, place] = is_last
            last_rows += [row] if is_last else []
            if logprobs:
                behind = [*ids[1:], *([] if following is None else [following])]
                following_RT[device, start : start + len(behind)] = behind
                first, num_R[device] = device * sizes.prefill_tokens + start, start + len(behind)
                spans.append((row, slice(first, first + len(behind))))
            start = end
    packed = Packed(*(array.reshape(-1) for array in (tokens_RT, row_RP, new_RP, last_RP)))
    places = np.flatnonzero(packed.last_R)
    return Call(packed, np.array(last_rows, int), places, spans, following_RT.reshape(-1), num_R)
