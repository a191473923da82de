"""What goes into a step of a `DeviceBatch`, and what comes out of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.inference.row_programs import Packed, Told
from deepseek_jax.inference.row_state import Sizes
from deepseek_jax.inference.sampling import MOST_LOGPROBS, NO_TOKEN, Kept, Logprobs


class Piece(NamedTuple):
    """Tokens of a row's prompt that go through the model behind those that went before.

    Attributes:
        row: its number.
        ids: at least one.
        is_last: the first new token is chosen after these.
        logprobs: log-probabilities are wanted of the tokens that follow each of these.
        following: the token behind the piece, where the prompt has one; read with `logprobs` and with drafts.
    """

    row: int
    ids: Sequence[int]
    is_last: bool
    logprobs: bool = False
    following: int | None = None


class Masks(NamedTuple):
    """What a masked row may choose in a step."""

    words_2W: np.ndarray  # of its next token, and of the token behind `draft`
    draft: int


class Call(NamedTuple):
    """Pieces that go through the model together, of R places a device.

    Attributes:
        packed: of all devices, one behind the other.
        last_rows: rows whose first token follows.
        last_places: theirs among the R of all devices.
        spans: rows that want log-probabilities, and the tokens of all devices that theirs follow.
        following_T: of `most_tokens` a device, the token behind each that is wanted.
        num_R: of each device, the tokens up to the last that is wanted.
        next_R: the prompt's token behind each piece.
        tokens: where each piece lies among the tokens of all devices, by row.
    """

    packed: Packed
    last_rows: np.ndarray
    last_places: np.ndarray
    spans: list[tuple[int, slice]]
    following_T: np.ndarray
    num_R: np.ndarray
    next_R: np.ndarray
    tokens: dict[int, slice]


class StepResult(NamedTuple):
    """What a step made; all NumPy.

    Attributes:
        tokens_BK: int32 new tokens of each row; K is 1, or 1 + `num_drafts`, times the steps of a burst.
            `sampling.NO_TOKEN` where the logits were not numbers: the row has ended.
        counts_B: int32, how many of them are there; 0 where none was chosen, or the row had ended before.
        finished_B: bool, rows of the step that have ended by themselves, now or before: the last token is an end id,
            the last of `max_new_tokens`, or `NO_TOKEN`. A prompt after which nothing is wanted ends without a token.
        logprobs: of new tokens, [B, K] and [B, K, `MOST_LOGPROBS`], where a row of the step asks for them.
        prompt_logprobs: by row, of pieces that ask: [n] and [n, `MOST_LOGPROBS`], for the tokens behind each of a
            piece's, n its tokens, or one less if nothing follows.
        routes: by row, where they are asked for, experts of the tokens that went through the model, uint8 or uint16
            [n, MoE layers, K], the best first.
        guess_B: int32, what a masked row may draft in its next step (`Device.set_mask`); `NO_TOKEN` for nothing.
        drafts_BN2: drafts of each row that were verified, up to one that ends it, and those that stand, in each of the
            N steps of a burst.
    """

    tokens_BK: np.ndarray
    counts_B: np.ndarray
    finished_B: np.ndarray
    logprobs: Logprobs | None
    prompt_logprobs: dict[int, Logprobs]
    guess_B: np.ndarray
    routes: dict[int, np.ndarray] = {}
    drafts_BN2: np.ndarray | None = None

    def logprobs_of(self, row: int) -> Logprobs | None:
        """Return those of a row, where there are any."""
        if self.logprobs is None:
            return None
        chosen_BK, ids_BKX, tops_BKX, kept = self.logprobs
        mine = None if kept is None else Kept(kept.words_BW[row], kept.drawn_B[row])
        return Logprobs(chosen_BK[row], ids_BKX[row], tops_BKX[row], mine)


class Step:
    """A step on its way: arrays of the device that nothing changes any more, and whose they are."""

    def __init__(self, num_rows: int, num_tokens: int):
        """Begin with nothing of `num_rows` rows, of which each may get `num_tokens`."""
        self._shape = num_rows, num_tokens
        self._told: list[tuple[Told, np.ndarray, np.ndarray, frozenset[int]]] = []
        self._evaluated: list[tuple[Logprobs, int, slice]] = []
        self._routed: list[tuple[jax.Array, int, slice]] = []
        self._result: StepResult | None = None

    def tell(self, told: Told, rows_X: np.ndarray, places_X: np.ndarray, wants: int, routed: np.ndarray) -> None:
        """Have what the entries `places_X` say of the rows `rows_X`; experts of the rows `routed`.

        `wants` are log-probabilities from 1 on, and what tokens were drawn among with 2.
        """
        logprobs = told.logprobs if wants else None
        if logprobs is not None and wants < 2:
            logprobs = logprobs._replace(kept=None)
        told = told._replace(logprobs=logprobs, routes_BSLK=told.routes_BSLK if len(routed) else None)
        _begin_reading(told)
        self._told.append((told, rows_X, places_X, frozenset(routed.tolist())))

    def route(self, routes_TLK: jax.Array, spans: Mapping[int, slice]) -> None:
        """Have the experts of prompts: each row's in its slice."""
        _begin_reading(routes_TLK)
        self._routed += [(routes_TLK, row, span) for row, span in spans.items()]

    def evaluate(self, logprobs: Logprobs, spans: Sequence[tuple[int, slice]]) -> None:
        """Have log-probabilities of prompts: each row's in its slice."""
        _begin_reading(logprobs)
        self._evaluated += [(logprobs, row, span) for row, span in spans]

    def read(self) -> StepResult:
        """Wait for the step, and return what it made; a second call returns the same."""
        if self._result is None:
            self._result = self._read()
            self._told, self._evaluated, self._routed = [], [], []
        return self._result

    def _read(self) -> StepResult:
        num_rows, num_tokens = self._shape
        tokens_BK, counts_B = np.zeros((num_rows, num_tokens), np.int32), np.zeros(num_rows, np.int32)
        finished_B, drafts_BN2, logprobs = np.zeros(num_rows, bool), None, None
        guess_B = np.full(num_rows, NO_TOKEN, np.int32)
        routes = {row: np.asarray(routes_TLK)[span] for routes_TLK, row, span in self._routed}
        for told, rows_X, places_X, routed in self._told:
            numbers = np.asarray(told.numbers_BX)[places_X]
            count = numbers.shape[1] - 2  # of tokens; a first token is alone
            tokens_BK[rows_X, :count] = numbers[:, :count]
            counts_B[rows_X], finished_B[rows_X] = numbers[:, -2], numbers[:, -1] > 0
            if told.drafts_BN2 is not None:
                told_BN2 = np.asarray(told.drafts_BN2)
                drafts_BN2 = np.zeros((num_rows, *told_BN2.shape[1:]), np.int32)
                drafts_BN2[rows_X] = told_BN2[places_X]
            if told.guess_B is not None:
                guess_B[rows_X] = np.asarray(told.guess_B)[places_X]
            if told.routes_BSLK is not None:
                ran = [(row, place) for row, place in zip(rows_X.tolist(), places_X, strict=True) if row in routed]
                routes |= {row: np.asarray(told.routes_BSLK)[place, : counts_B[row]] for row, place in ran}
            if told.logprobs is not None:
                logprobs = logprobs or _empty(num_rows, num_tokens)
                if told.logprobs.kept is not None and logprobs.kept is None:
                    logprobs = logprobs._replace(kept=_nothing_kept(told.logprobs.kept, num_rows, num_tokens))
                for whole, part in _pairs(logprobs, told.logprobs):
                    whole[rows_X, :count] = np.asarray(part)[places_X].reshape(-1, count, *whole.shape[2:])
        prompts = {}
        for found, row, span in self._evaluated:
            leaves: Any = (np.asarray(leaf)[span] for leaf in found[:3])
            prompts[row] = Logprobs(*leaves)
        return StepResult(tokens_BK, counts_B, finished_B, logprobs, prompts, guess_B, routes, drafts_BN2)


def _begin_reading(tree) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()


def _empty(*shape: int) -> Logprobs:
    """Return log-probabilities of tokens of `shape`, all 0."""
    tops = (np.zeros((*shape, MOST_LOGPROBS), dtype) for dtype in (np.int32, np.float32))
    leaves: Any = (np.zeros(shape, np.float32), *tops)
    return Logprobs(*leaves)


def _nothing_kept(kept: Kept, *shape: int) -> Kept:
    """Return the same for tokens of `shape`, all 0."""
    leaves: Any = np.zeros((*shape, kept.words_BW.shape[-1]), np.int32), np.zeros(shape, np.float32)
    return Kept(*leaves)


def _pairs(whole: Logprobs, part: Logprobs) -> Iterator[tuple[Any, Any]]:
    """Pair the arrays of both; `part` may lack what was kept."""
    yield from zip(whole[:3], part[:3], strict=True)
    if part.kept is not None and whole.kept is not None:
        yield from zip(whole.kept, part.kept, strict=True)


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
    new_RP, next_RP, last_RP = np.zeros_like(row_RP), np.zeros_like(row_RP), np.zeros(row_RP.shape, bool)
    following_RT, num_R = np.zeros((sizes.devices, sizes.prefill_tokens), np.int32), np.zeros(sizes.devices, np.int32)
    spans, last_rows, tokens = [], [], {}
    for device, queue in enumerate(queues):
        start = 0
        for place, (row, ids, is_last, logprobs, following) in enumerate(queue):
            end = start + len(ids)
            tokens[row] = slice(device * num_tokens + start, device * num_tokens + end)
            tokens_RT[device, start:end] = ids
            row_RP[device, place], new_RP[device, place] = row - device * sizes.each, len(ids)
            last_RP[device, place], next_RP[device, place] = is_last, following or 0
            last_rows += [row] if is_last else []
            if logprobs:
                behind = [*ids[1:], *([] if following is None else [following])]
                following_RT[device, start : start + len(behind)] = behind
                first, num_R[device] = device * sizes.prefill_tokens + start, start + len(behind)
                spans.append((row, slice(first, first + len(behind))))
            start = end
    flat: Any = (array.reshape(-1) for array in (tokens_RT, row_RP, new_RP, last_RP))
    packed = Packed(*flat)
    places = np.flatnonzero(packed.last_R)
    return Call(
        packed, np.array(last_rows, int), places, spans, following_RT.reshape(-1), num_R, next_RP.reshape(-1), tokens
    )
