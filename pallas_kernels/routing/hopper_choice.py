"""The choice of experts on Hopper: a block per token, a lane per expert, nothing sorted.

A lane adds up its expert's partial logits and keeps its score. What others must know goes through shared memory: every
thread reads the biased scores of all experts there, one after the other as a scalar, and computes

    the two best of each group, and from them which groups stay     by all threads alike, in scalars
    how many experts come before its own, the rank                  each for its own

Lanes of rank 0 to K - 1 say who they are in sums of 32 bits, four of them in the bytes of one. Gates come from shared
memory again, best expert first, as `reference.py` has them.

Worked example, E = 4 in two groups of which one stays, K = 2, scores and bias added up to [.1 .9 | .4 .5]:

    groups    (.1 .9) 1.0 and (.4 .5) .9: the first stays
    ranks     [1 0 | 2 3], experts of groups left out counting as -inf
    sum       0 << 8 for rank 1, 1 << 0 for rank 0: 1, whose bytes are experts 1 and 0
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts_decode.plan import WORD
from pallas_kernels.routing.rule import Rule

LANES = 128  # of a warpgroup
BYTE, BYTES = 8, 4  # bits; of a word
UNROLLED = 8  # experts of each piece that are read in one turn
PIECES = 8  # into which experts without groups are cut


@dataclasses.dataclass(frozen=True)
class Choice:
    """The static facts of the choice.

    Attributes:
        n: rows.
        num_routed: E.
        num_experts: those from E on are everybody's.
        rule: how.
    """

    n: int
    num_routed: int
    num_experts: int
    rule: Rule

    @property
    def columns(self) -> int:
        """Lanes: experts, filled up to warpgroups."""
        return -(-self.num_experts // LANES) * LANES

    @property
    def words(self) -> int:
        """Of the bits of all experts."""
        return -(-self.num_experts // WORD)

    def out_types(self) -> list[jax.ShapeDtypeStruct]:
        """Return experts and gates [N, K + num_experts - E], and what else is said of each token.

        These are scores FP32 [N, columns], gates FP32 [columns, N], those of everybody too and 0 where an expert is not
        the token's, and its experts as bits, int32 [N, words].
        """
        many = self.rule.k + self.num_experts - self.num_routed
        shapes = (self.n, many), (self.n, many), (self.n, self.columns), (self.columns, self.n), (self.n, self.words)
        dtypes = jnp.int32, jnp.float32, jnp.float32, jnp.float32, jnp.int32
        return [jax.ShapeDtypeStruct(*both) for both in zip(shapes, dtypes, strict=True)]

    def scratch(self) -> list:
        """Return what lanes say to each other, and the barrier of a copy."""
        return [*[plgpu.SMEM((self.columns,), jnp.float32)] * 3, plgpu.Barrier()]

    def take_token(self, token: Array, partial_ref, bias_ref, valid_ref, outputs: tuple, scratch: tuple) -> None:
        """Choose for a token; partial logits FP32 [cuts, N, columns] may be anything in columns from E on."""
        (scores_home, biased_home, bias_home, copied), rule, num_routed = scratch, self.rule, self.num_routed
        experts_ref, gates_ref, scores_ref, table_ref, words_ref = outputs
        lanes = plgpu.Layout.WG_STRIDED((self.columns,), vec_size=1)
        plgpu.copy_gmem_to_smem(bias_ref, bias_home.at[pl.ds(0, num_routed)], copied)
        index = plgpu.broadcasted_iota(jnp.int32, (self.columns,), 0, layout=lanes)
        parts = [plgpu.load(partial_ref.at[cut, token], layout=lanes) for cut in range(partial_ref.shape[0])]
        valid, num_experts = valid_ref[token], self.num_experts
        routed = index < num_routed
        scores = gate(rule, jnp.where(routed, functools.reduce(jnp.add, parts), -jnp.inf))
        scores_ref[token, :] = scores
        scores_home[...] = scores
        plgpu.barrier_wait(copied)
        biased = jnp.where(routed, scores + plgpu.load(bias_home, layout=lanes), -jnp.inf)
        biased_home[...] = biased
        chosen = ranks(rule, num_routed, biased_home, biased, index)
        experts = first_of(chosen, index, rule.k)
        experts = [jnp.minimum(expert, num_routed - 1) for expert in experts]  # of a row of NaN they may be any
        found = [scores_home[expert] for expert in experts]
        total = functools.reduce(jnp.add, found) + 1e-20
        weights = [(weight / total if rule.normalize else weight) * rule.scale for weight in found]
        everybody = range(num_routed, num_experts)
        for i, (expert, weight) in enumerate([*zip(experts, weights, strict=True), *((e, 1.0) for e in everybody)]):
            experts_ref[token, i] = jnp.where(valid > 0, jnp.int32(expert), num_experts)
            gates_ref[token, i] = jnp.where(valid > 0, weight, 0.0)
        own = (scores / total if rule.normalize else scores) * rule.scale
        own = jnp.where(routed, jnp.where(chosen < rule.k, own, 0.0), 1.0)
        table_ref[:, token] = jnp.where(index < jnp.where(valid > 0, num_experts, 0), own, 0.0)
        for word in range(self.words):
            bits = bits_of(experts, word) | jnp.int32(sum_of_bits(everybody, word))
            words_ref[token, word] = jnp.where(valid > 0, bits, 0)


def gate(rule: Rule, logits: Array) -> Array:
    """Return scores; logits are -inf in lanes without an expert."""
    if rule.gate == "sigmoid":
        return 1 / (1 + jnp.exp(-logits))
    powers = jnp.exp(logits - jnp.max(logits))
    return powers / jnp.sum(powers)


def ranks(rule: Rule, num_routed: int, home, biased: Array, index: Array) -> Array:
    """Return how many experts come before each lane's own: larger, or equal and of a lower index."""
    pieces = rule.num_groups if rule.grouped else PIECES
    size = num_routed // pieces
    kept = best_groups(rule, home, size) if rule.grouped else None
    if kept is not None:
        piece = lax.div(index, jnp.int32(size))
        stays = jnp.zeros_like(index)
        for number, keep in enumerate(kept):
            stays = jnp.where(piece == number, keep, stays)
        biased = jnp.where(stays > 0, biased, -jnp.inf)

    def compare(i, before):
        for number in range(pieces):
            other = home[number * size + i]
            if kept is not None:
                other = jnp.where(kept[number] > 0, other, -jnp.inf)
            comes_first = (other > biased) | ((other == biased) & (index > number * size + i))
            before += jnp.where(comes_first, 1, 0)
        return before

    return over(size, compare, jnp.zeros_like(index))


def best_groups(rule: Rule, home, size: int) -> list[Array]:
    """Return int32 1 for each group that stays, 0 for others; equal groups stay in order."""

    def best_two(i, best):
        values = [home[number * size + i] for number in range(rule.num_groups)]
        return tuple(
            (jnp.maximum(first, value), jnp.maximum(second, jnp.minimum(first, value)))
            for value, (first, second) in zip(values, best, strict=True)
        )

    lowest = jnp.float32(-jnp.inf)
    best = over(size, best_two, ((lowest, lowest),) * rule.num_groups)
    top = [first + second if rule.group_score == "top2" else first for first, second in best]

    def place(number):
        others = [(other >= top[number]) if i < number else (other > top[number]) for i, other in enumerate(top)]
        return functools.reduce(jnp.add, [jnp.where(other, 1, 0) for other in others])

    return [jnp.where(place(number) < rule.num_kept_groups, 1, 0) for number in range(rule.num_groups)]


def over(size: int, body: Callable, carry):
    """Fold `body(i, carry)` over a number of turns, some of them in one."""
    unrolled = next(count for count in (UNROLLED, 4, 2, 1) if size % count == 0)

    def some(turn, carry):
        for i in range(unrolled):
            carry = body(turn * unrolled + i, carry)
        return carry

    return some(0, carry) if size == unrolled else lax.fori_loop(0, size // unrolled, some, carry)


def first_of(rank: Array, index: Array, k: int) -> list[Array]:
    """Return the experts of ranks 0 to k - 1, int32 scalars from 0 to 255."""
    experts = []
    for first in range(0, k, BYTES):
        place = rank - first
        shifted = lax.shift_left(index, jnp.where(place > 0, place, 0) * BYTE)
        word = jnp.sum(jnp.where((place >= 0) & (place < BYTES), shifted, 0))
        bytes_here = range(min(BYTES, k - first))
        experts += [lax.shift_right_logical(word, jnp.int32(byte * BYTE)) & (2**BYTE - 1) for byte in bytes_here]
    return experts


def bits_of(experts: list[Array], word: int) -> Array:
    """Return the bits of experts in one of the words."""
    bits = [
        jnp.where(lax.div(expert, jnp.int32(WORD)) == word, lax.shift_left(jnp.int32(1), expert & (WORD - 1)), 0)
        for expert in experts
    ]
    return functools.reduce(jnp.bitwise_or, bits)


def sum_of_bits(experts: range, word: int) -> int:
    """Return the bits of known experts in one of the words, as an int32."""
    bits = sum(1 << (expert % WORD) for expert in experts if expert // WORD == word)
    return bits - 2**WORD if bits >= 2 ** (WORD - 1) else bits
