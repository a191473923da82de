"""Which expert is multiplied with which rows in a decoding step: the visits of the Hopper kernels.

A visit is an expert and N rows, the columns of its products. There are two ways to choose the rows:

    dense    at most `MOST_DENSE` tokens: the rows of every visit are all tokens, and the gate is 0 where a token did
             not choose the expert. Nothing is sorted or moved. The tensor cores have time for it: memory gives a
             multiprocessor 18 bytes of weights a clock, and 64 x 16 weights in BF16 with N columns take N / 2 clocks.
             All that a kernel needs is a bit for each expert: who is visited.
    sorted   more tokens: rows are the tokens of the expert, N at a time, copied in the order of their experts.

Worked example, three tokens that choose [5 1], [1 7], [5 none], in N = 8 rows:

    dense    bits of experts 1, 5, 7         visits (1; 0 1 2 -), (5; 0 1 2 -), (7; 0 1 2 -)
    sorted   counts 1: 2, 5: 2, 7: 1         visits (1; 0 1 -), (5; 0 2 -), (7; 1 -)
             rows                            [0 1 - - - - - - | 0 2 - - - - - - | 1 - ...]
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

WORD = 32  # bits
ROW_UNIT = 8  # columns of a product are a multiple of it
KEYS_UNIT = 128  # lanes of a warpgroup
MOST_DENSE = 32  # rows of a visit


class Visit(NamedTuple):
    """An expert, the row of its gates, and its first row among the activations."""

    expert: Array
    gates: Array
    row: Array


class Dense(NamedTuple):
    """What dense visits are made of.

    Attributes:
        gates: FP32 [E or more, N]: of each expert and row, 0 where the expert is not the row's.
        words: int32 [., words]: experts with rows, as bits; an expert has rows if any of the first dim says so.
        zeros: int32 [256], for the marks of the kernel (`hopper.marks`), where there are any.
    """

    gates: Array
    words: Array
    zeros: Array | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The visits of a step.

    Attributes:
        tables: arrays that `schedule` reads in the kernel.
        schedule: refs of the tables -> the number of visits, and a function from the number of a visit to the `Visit`.
        gates: FP32 [., N], 0 where a row is no token of the expert; dense for each expert, sorted for each visit.
        rows: N, of a visit.
        most_visits: that there can be.
        dense: whether rows are tokens.
    """

    tables: tuple[Array, ...]
    schedule: Callable[..., tuple[Array, Callable[[Array], Visit]]]
    gates: Array | None
    rows: int
    most_visits: int
    dense: bool


def rows_of_visit(num_tokens: int, k: int, num_experts: int, most_sorted: int) -> int:
    """Return N for a number of tokens, sorted at most `most_sorted`."""
    if num_tokens <= MOST_DENSE:
        return round_up(num_tokens)
    mean = num_tokens * k / num_experts
    most = mean + 3 * mean**0.5  # hardly an expert of a spread routing has more
    return round_up(min(most / math.ceil(mean / most_sorted), most_sorted))


def round_up(rows: float) -> int:
    """Return the next multiple of `ROW_UNIT`."""
    return max(1, math.ceil(rows / ROW_UNIT)) * ROW_UNIT


def only_here(experts_TK: Array, num_experts: int) -> Array:
    """Return E in place of every value outside [0, E)."""
    return jnp.where((experts_TK >= 0) & (experts_TK < num_experts), experts_TK, num_experts)


def make_dense(experts_TK: Array, gates_TK: Array, num_experts: int, rows: int) -> Dense:
    """Return what visits of all tokens are made of."""
    num_tokens, k = experts_TK.shape
    words = -(-num_experts // WORD)
    flat = experts_TK.reshape(-1)
    bits = jnp.left_shift(jnp.int32(1), flat % WORD)
    own = (flat // WORD == jnp.arange(words)[:, None]) & (flat < num_experts)
    mask = lax.reduce(jnp.where(own, bits, 0), jnp.int32(0), lax.bitwise_or, (1,))
    missing = (0, rows - num_tokens), (0, 0)
    experts_NK = jnp.pad(experts_TK, missing, constant_values=num_experts)
    chosen = experts_NK == jnp.arange(num_experts)[:, None, None]  # [E, N, K]
    gates = jnp.where(chosen, jnp.pad(gates_TK, missing), 0).sum(2)
    return Dense(gates, mask[None])


def dense_plan(dense: Dense, num_experts: int, most_visits: int) -> Plan:
    """Return visits of all tokens."""
    rows, (said, words) = dense.gates.shape[1], dense.words.shape

    def schedule(words_ref):
        read = [[words_ref[row, i] for row in range(said)] for i in range(words)]
        found = [functools.reduce(jnp.bitwise_or, parts) for parts in read]
        counts = [ones(word) for word in found]

        def find(number):
            word, first, rank, before = found[0], jnp.int32(0), number, counts[0]
            for i in range(1, words):  # the word that has it
                behind = number >= before
                word, first = jnp.where(behind, found[i], word), jnp.where(behind, i * WORD, first)
                rank, before = jnp.where(behind, number - before, rank), before + counts[i]
            expert = first + place(word, rank)
            return Visit(expert, expert, number * rows)

        return sum(counts, jnp.int32(0)), find

    most = min(num_experts, most_visits)
    return Plan((dense.words,), schedule, dense.gates, rows, most, dense=True)


def ones(word: Array) -> Array:
    """Return how many bits of int32 `word` are set."""
    word = word - (shift(word, 1) & 0x55555555)
    word = (word & 0x33333333) + (shift(word, 2) & 0x33333333)
    word = (word + shift(word, 4)) & 0x0F0F0F0F
    return shift(word * 0x01010101, 24)


def place(word: Array, rank: Array) -> Array:
    """Return the place of the set bit of int32 `word` that has `rank` set bits below it."""
    found = jnp.int32(0)
    for half in (16, 8, 4, 2, 1):
        below = ones(word & ((1 << half) - 1))
        above = rank >= below
        word = jnp.where(above, shift(word, half), word)
        rank = jnp.where(above, rank - below, rank)
        found = jnp.where(above, found + half, found)
    return found


def shift(word: Array, count: int) -> Array:
    """Shift to the right, zeros coming in."""
    return lax.shift_right_logical(word, jnp.int32(count))


def make_sorted(experts_TK: Array, num_experts: int, rows: int) -> tuple[Plan, Array, Array]:
    """Return visits of the tokens of each expert, and what `hopper_sort.sort_rows` needs: keys and first visits.

    The table has the number of visits, then their experts. The gates are not there yet.
    """
    flat, most = experts_TK.reshape(-1), min(experts_TK.size, experts_TK.size // rows + num_experts)
    keys = jnp.pad(flat, (0, -flat.size % KEYS_UNIT), constant_values=num_experts)
    everyone = jnp.arange(num_experts)
    visits_E = ((keys == everyone[:, None]).sum(1, dtype=jnp.int32) + rows - 1) // rows
    first_E = jnp.where(everyone < everyone[:, None], visits_E, 0).sum(1, dtype=jnp.int32)
    number = jnp.arange(most + 1)  # one more than that of the visit: the first place is that of the total
    ended = (first_E + visits_E < number[:, None]) | (number == 0)[:, None]
    table = jnp.where(ended, jnp.where((number == 0)[:, None], visits_E, 1), 0).sum(1, dtype=jnp.int32)

    def schedule(table_ref):
        return table_ref[0], lambda number: Visit(table_ref[number + 1], number, number * rows)

    return Plan((table,), schedule, None, rows, most, dense=False), keys, first_E
