"""The rows of a batch as the device keeps them, and the small records by which the host changes them.

What a step changes lies apart from what a job brings along, so that a greedy step touches four numbers of a row:

    Progress   length, last token, tokens left, whether it has ended     every step
    Settings   end ids, and all that `row_sampling.choose` reads         when a row opens
    Seen       which tokens it has, for penalties                        steps with such rows

A record is a row's settings in int32 words. The host writes it as a NumPy structure (`RECORD`); `update` scatters
records into the rows. A closed row is one that has ended, with neutral settings.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from deepseek_jax.inference.prefill import FEWEST_TOKENS
from deepseek_jax.inference.requests import NOWHERE, PLAIN, Request
from deepseek_jax.inference.row_sampling import ANY, BY_ID, DRAWN, GREEDY, WORD, Choice, RowSampling
from deepseek_jax.inference.sampling import NO_TOKEN, Bias, Sampling, Seen
from deepseek_jax.parameters import ROWS, P

MOST_END_IDS = 8  # EOS among them
MOST_BIASES = 300  # ids of one job, OpenAI's
MOST_RECORDS = 8  # rows that one update changes
SETTINGS, MASK = 1, 2  # what a record writes: bits of `writes`


class Sizes(NamedTuple):
    """What programs are made for.

    Attributes:
        devices: that rows are split over.
        rows: of all devices.
        pages: of each device.
        columns: of a row's table.
        positions: of the longest row.
        prefill_tokens: most of a device in a call, a power of two.
        bulk: all rows can have bursts, not the first ones alone.
    """

    devices: int
    rows: int
    pages: int
    columns: int
    positions: int
    prefill_tokens: int
    bulk: bool = False

    @property
    def each(self) -> int:
        """Rows of a device."""
        return self.rows // self.devices

    @property
    def buckets(self) -> list[int]:
        """Numbers of tokens that prefill has programs for, of each device."""
        return sorted({max(FEWEST_TOKENS, self.prefill_tokens // part) for part in (1, 4, 16)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What the device needs to know of a job when its row opens.

    Attributes:
        sampling: how tokens are chosen.
        own: seed, bias and log-probabilities; `own.num_logprobs` stands before that of `sampling`.
        seed: of the draws where `own` has none, with `number`: as `seed` and the row's number in `requests.make_rows`.
        number: of the request.
        max_new_tokens: the row ends after so many more; 0: no token is chosen.
        end_ids: the row ends with any of these, beside EOS. The device knows the first `MOST_END_IDS` only; the host
            ends a text at the others.
        ignore_eos: EOS ends nothing.
        prompt: its ids; read only where there are penalties.
        output: ids that the job had made when it was preempted, which now stand behind its prompt; read as `prompt` is.
        length: tokens that its pages have already: those of a known prefix.
        masked: the row has a grammar: `set_mask` comes before each step that chooses a token for it.
        routes: the experts of its tokens come along.
        kept: what its tokens were drawn among comes along.
    """

    sampling: Sampling
    own: Request = PLAIN
    seed: int = 0
    number: int = 0
    max_new_tokens: int
    end_ids: Sequence[int] = ()
    ignore_eos: bool = False
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    length: int = 0
    masked: bool = False
    routes: bool = False
    kept: bool = False

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities come with its tokens."""
        return (self.own.num_logprobs, self.sampling.num_logprobs) != (None, None)

    @property
    def kind(self) -> str:
        """The least of the programs' ways of choosing that its tokens need."""
        own, num_logprobs = self.own.num_logprobs, self.sampling.num_logprobs
        if self.kept or self.sampling.top_k or self.sampling.top_p < 1 or (num_logprobs if own is None else own):
            return ANY
        if self.sampling.penalizes or self.own.logit_bias or self.masked:
            return BY_ID
        return DRAWN if self.wants_logprobs or RowSampling.numbers(self.sampling).temperature > 0 else GREEDY


class Progress(NamedTuple):
    """Where each row stands."""

    length_B: Array  # int32, tokens in its pages
    token_B: Array  # int32, chosen, not yet run through the model
    left_B: Array  # int32, tokens that may be chosen yet
    finished_B: Array  # bool: has ended, or is not open

    def after(self, end_ids_BE: Array, tokens_B: Array, chosen_B: Array) -> "Progress":
        """Return where the rows of `chosen_B` stand with a new token, which may end them."""
        left_B = self.left_B - chosen_B
        is_end_B = (tokens_B[:, None] == end_ids_BE).any(axis=1) | (tokens_B == NO_TOKEN) | (left_B <= 0)
        token_B = jnp.where(chosen_B, tokens_B, self.token_B)
        return Progress(self.length_B, token_B, left_B, self.finished_B | chosen_B & is_end_B)


class Ahead(NamedTuple):
    """What masked rows draft: the host has to say what may follow a draft (`speculative`)."""

    draft_B: Array  # int32, `NO_TOKEN` for none
    mask_BW: Array  # int32, of the token behind it


class Settings(NamedTuple):
    """What the job of each row brought along."""

    end_ids_BE: Array
    choice: Choice
    ahead: Ahead


class RowState(NamedTuple):
    """The rows of a batch."""

    progress: Progress
    settings: Settings
    seen: Seen


_ints, _floats = (lambda name, *shape, kind=kind: (name, kind, shape) for kind in ("<i4", "<f4"))
RECORD = np.dtype(
    [
        *map(_ints, ("row", "writes", "length", "left", "finished", "number")),
        *map(_ints, ("masked", "draft", "wants", "top_k")),
        ("seed", "<u4", 2),
        *map(_floats, (name for name in RowSampling._fields if name != "top_k")),
        _ints("end_ids", MOST_END_IDS),
        _ints("bias_ids", MOST_BIASES),
        _floats("bias_values", MOST_BIASES),
    ]
)
NUM_WORDS = RECORD.itemsize // 4


def closed_records(num: int) -> np.ndarray:
    """Return records that write nothing; with `writes` and a row they close it."""
    records = np.zeros(num, RECORD)
    for name, value in RowSampling.numbers(Sampling(temperature=0.0, top_k=0, top_p=1.0))._asdict().items():
        records[name] = value
    records["finished"], records["end_ids"], records["bias_ids"], records["draft"] = 1, NOWHERE, NOWHERE, NO_TOKEN
    return records


def write_record(record: np.void, settings: RowSettings, eos: int) -> None:
    """Write a job's settings into a record that was closed."""
    own = settings.own
    seed, number = (settings.seed, settings.number) if own.seed is None else (own.seed, 0)
    record["length"], record["left"], record["finished"] = settings.length, settings.max_new_tokens, False
    record["seed"], record["number"] = (seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF), number
    record["masked"], record["wants"] = settings.masked, 2 if settings.kept else int(settings.wants_logprobs)
    for name, value in RowSampling.numbers(settings.sampling)._asdict().items():
        record[name] = value
    end_ids = [*(() if settings.ignore_eos else (eos,)), *settings.end_ids][:MOST_END_IDS]
    record["end_ids"][: len(end_ids)] = end_ids
    record["bias_ids"][: len(own.logit_bias)] = list(own.logit_bias)
    record["bias_values"][: len(own.logit_bias)] = list(own.logit_bias.values())


def empty_state(num_rows: int, vocab_size: int) -> RowState:
    """Return rows that are all closed, as NumPy arrays."""
    zeros: Any = np.zeros
    records, ints, bools = closed_records(num_rows), zeros(num_rows, np.int32), zeros(num_rows, bool)
    field: Any = {name: np.array(records[name]) for name in RECORD.names or ()}
    sampling = RowSampling(*(field[name] for name in RowSampling._fields))
    mask_BW = zeros((num_rows, -(-vocab_size // WORD)), np.int32)
    bias = Bias(field["bias_ids"], field["bias_values"])
    choice = Choice(sampling, zeros((num_rows, 2), np.uint32), bias, mask_BW, bools, ints)
    seen = Seen(zeros((num_rows, vocab_size), bool), zeros((num_rows, vocab_size), np.int32))
    settings = Settings(field["end_ids"], choice, Ahead(field["draft"], mask_BW))
    return RowState(Progress(ints, ints, ints, ~bools), settings, seen)


def update(progress: Progress, settings: Settings, records_UX: Array, words_U2W: Array) -> tuple[Progress, Settings]:
    """Write records, int32 words [U, X], and masks into their rows; rows of all devices have numbers in one line.

    A row's masks are that of its next token and that of the token behind its draft.
    """

    def local(progress, settings, records_UX, words_U2W):
        field, each = _fields(records_UX), len(progress.length_B)
        row_U = local_rows(field["row"], each)
        open_U, mask_U = (jnp.where(field["writes"] & bit > 0, row_U, each) for bit in (SETTINGS, MASK))

        def put(row_U, old, new):
            return old.at[row_U].set(new.astype(old.dtype), mode="drop")

        keys_U = jax.random.wrap_key_data(field["seed"], impl="threefry2x32")
        key_data_U2 = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys_U, field["number"].astype(jnp.uint32)))
        sampling = RowSampling(*(field[name] for name in RowSampling._fields))
        bias = Bias(field["bias_ids"], field["bias_values"])
        old = settings.choice
        choice = Choice(sampling, key_data_U2, bias, old.mask_BW, field["masked"], field["wants"])
        nothing_UW = jnp.zeros((len(row_U), old.mask_BW.shape[1]))
        new = Settings(field["end_ids"], choice._replace(mask_BW=nothing_UW), Ahead(field["draft"], nothing_UW))
        settings = jax.tree.map(lambda old, new: put(open_U, old, new), settings, new)
        draft_B, mask_BW = put(mask_U, settings.ahead.draft_B, field["draft"]), settings.choice.mask_BW
        behind_BW = put(mask_U, settings.ahead.mask_BW, words_U2W[:, 1])
        choice = settings.choice._replace(mask_BW=put(mask_U, mask_BW, words_U2W[:, 0]))
        settings = settings._replace(choice=choice, ahead=Ahead(draft_B, behind_BW))
        begun = Progress(field["length"], jnp.zeros_like(row_U), field["left"], field["finished"])
        return jax.tree.map(lambda old, new: put(open_U, old, new), progress, begun), settings

    split: Any = P(ROWS)
    run = jax.shard_map(local, in_specs=(split, split, P(), P()), out_specs=(split, split))
    return run(progress, settings, records_UX, words_U2W)


def see(seen: Seen, ids_M: Array, row: Array, num_prompt: Array, num_tokens: Array) -> Seen:
    """Let a row have seen a prompt, and behind it tokens of its output; ids behind `num_tokens` do not count."""

    def local(seen, ids_M, row, num_prompt, num_tokens):
        each, vocab_size = seen.count_BV.shape
        where, place = local_rows(row[None], each), jnp.arange(len(ids_M))
        prompt_V, count_V = (
            jnp.zeros(vocab_size, jnp.int32).at[jnp.where(among, ids_M, vocab_size)].add(1, mode="drop")
            for among in (place < num_prompt, (place >= num_prompt) & (place < num_tokens))
        )
        prompt_BV = seen.prompt_BV.at[where].set(prompt_V > 0, mode="drop")
        return Seen(prompt_BV, seen.count_BV.at[where].set(count_V, mode="drop"))

    split: Any = P(ROWS)
    run = jax.shard_map(local, in_specs=(split, P(), P(), P(), P()), out_specs=split)
    return run(seen, ids_M, row, num_prompt, num_tokens)


def local_rows(row_U: Array, each: int) -> Array:
    """Return the numbers of rows on this device, which has `each`; `each`, which is none, for those of others."""
    row_U = row_U - lax.axis_index(ROWS) * each
    return jnp.where((row_U >= 0) & (row_U < each), row_U, each)


def _fields(records_UX: Array) -> dict[str, Array]:
    """Return the fields of records, [U] or [U, words of the field] each."""
    found = {}
    for name, (dtype, offset, *_) in (RECORD.fields or {}).items():
        words = records_UX[:, offset // 4 : (offset + dtype.itemsize) // 4]
        words = lax.bitcast_convert_type(words, dtype.base)
        found[name] = words if dtype.shape else words[:, 0]
    return found
