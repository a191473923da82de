"""Attention: the chunked core against a plain softmax, and the absorbed form against the expanded one (golden 2).

Also the memory of the core, documents in one row, and a cache of another kind.
"""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.inference.cache import contiguous_tables
from deepseek_jax.model import flash
from deepseek_jax.model.absorbed import LayerPages, UpProjection, absorbed
from deepseek_jax.model.attention import Attention, expanded
from deepseek_jax.model.chunked_attention import MOST_UNROLLED_CHUNKS
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.prefill import Sequences, expanded_over_pages
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve
from deepseek_jax.parameters import ROWS, P
from tests.support import small

B, S, N, Q, H = 2, 33, 3, 6, 5
SCALE = 0.4
# One block; three equal ones; five with a short one, unrolled; nine with a short one, scanned; eleven, scanned.
CHUNKS = [64, 11, 7, 4, 3]
assert -(-S // 7) <= MOST_UNROLLED_CHUNKS < -(-S // 4)


@functools.cache
def core(chunk):
    """`attend` with gradients, jitted."""
    execution = small.config().with_(execution={"attention": "xla", "attention_chunk": chunk}).execution

    def run(q, k, v, segments, g):
        out, pull = jax.vjp(lambda *qkv: flash.attend(execution, *qkv, segments, SCALE)[0], q, k, v)
        return out, pull(g)

    return jax.jit(run)


def plain(q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS):
    """The definition: one softmax over the positions a query may see."""
    scores = jnp.einsum("bsnq,bmnq->bnsm", q_BSNQ, k_BSNQ) * SCALE
    length = scores.shape[-1]
    seen = jnp.tril(jnp.ones((length, length), bool)) & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
    return jnp.einsum("bnsm,bmnh->bsnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1), v_BSNH)


@jax.jit
def plain_with_gradients(q, k, v, segments, g):
    out, pull = jax.vjp(lambda *qkv: plain(*qkv, segments), q, k, v)
    return out, pull(g)


def draw(length=S):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = jax.random.normal(keys[0], (B, length, N, Q)), jax.random.normal(keys[1], (B, length, N, Q))
    return (
        2.0 * q,
        2.0 * k,
        jax.random.normal(keys[2], (B, length, N, H)),
        jax.random.normal(keys[3], (B, length, N, H)),
    )


def draw_segments(case, length=S):
    """Segment ids: one document, or a row of three that end within chunks and a row with padding."""
    segments = np.ones((B, length), np.int32)
    if case == "packed":
        segments[0, 13:], segments[0, 14:] = 2, 3
        segments[1, 20:] = 0
    return segments


@pytest.mark.parametrize("case", ["one document", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_equal_the_plain_softmax_in_value_and_gradient(chunk, case):
    q, k, v, g = draw()
    got = core(chunk)(q, k, v, draw_segments(case), g)
    want = plain_with_gradients(q, k, v, draw_segments(case), g)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())  # measured 7e-7: sums in another order


@pytest.mark.parametrize("chunk", [64, 7, 4])
def test_two_devices_equal_one(chunk):
    """Inside a checked shard_map: loop carries vary as their updates do, and XLA compiles it.

    It once crashed on more than one device.
    """
    q, k, v, g = draw()
    arrays = [np.asarray(a) for a in (q, k, v, draw_segments("packed"), g)]
    specs = tuple(P(ROWS, *(None,) * (a.ndim - 1)) for a in arrays)
    sharded = jax.shard_map(core(chunk).__wrapped__, in_specs=specs, out_specs=(specs[0], (specs[0],) * 3))
    with jax.set_mesh(make_mesh(small.config((2, 1, 1)).mesh, jax.devices()[:2])):
        got = jax.jit(sharded)(*(jax.device_put(a, spec) for a, spec in zip(arrays, specs, strict=True)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(core(chunk)(*arrays)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("chunk", [64, 7, 4])
def test_documents_do_not_see_each_other(chunk):
    """Queries and keys of 1e12 in a document change no bit of values and gradients of others, and overflow nowhere."""
    q, k, v, g = draw()
    segments = draw_segments("packed")
    other = (segments == 2) | (segments == 0)
    poison = jnp.where(other[..., None, None], 1e12, 1.0)
    out, grads = core(chunk)(q * poison, k * poison, v, segments, g)
    want_out, want_grads = core(chunk)(q, k, v, segments, g)
    for a, b in zip((out, *grads), (want_out, *want_grads), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[~other], np.asarray(b)[~other])
    assert np.isfinite(out).all()


def largest_intermediate(jaxpr):
    """Elements of the largest array that any equation of a jaxpr makes, inner jaxprs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars]
        sizes += [largest_intermediate(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
    return max(sizes)


@pytest.mark.parametrize("chunk", [64, 32], ids=["unrolled", "scanned"])
def test_no_array_of_s_times_s(chunk):
    """Forward and backward: no intermediate reaches S x S per head.

    Nothing of that size is kept, and the memory of the program stays below it.
    """
    length = 512
    args = *draw(length)[:3], draw_segments("one document", length), draw(length)[3]
    assert (length // chunk <= MOST_UNROLLED_CHUNKS) == (chunk == 64)
    square = B * N * length * length
    assert largest_intermediate(jax.make_jaxpr(core(chunk))(*args).jaxpr) <= square * chunk // length
    assert core(chunk).lower(*args).compile().memory_analysis().temp_size_in_bytes < 4 * square // 2
    execution = small.config().with_(execution={"attention": "xla", "attention_chunk": chunk}).execution
    _, pull = jax.eval_shape(
        lambda q, k, v: jax.vjp(lambda *qkv: flash.attend(execution, *qkv, args[3], SCALE)[0], q, k, v), *args[:3]
    )
    inputs_and_output = sum(a.size for a in args[:4]) + B * length * N * H
    # and one statistic per query
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= inputs_and_output + B * length * N


def test_program_does_not_grow_with_the_number_of_chunks():
    def lines(length):
        return (
            core(3)
            .lower(*draw(length)[:3], draw_segments("one document", length), draw(length)[3])
            .as_text()
            .count("\n")
        )

    assert lines(3 * 20) == lines(3 * 40)


def test_impossible_implementations_are_refused():
    q, k, v, _ = draw()
    for choice, message in {"cudnn": "takes BF16 and one segment per row", "auto": "'auto' is not resolved"}.items():
        execution = small.config().with_(execution={"attention": choice}).execution
        with pytest.raises(ValueError, match=message):
            flash.attend(execution, q, k, v, draw_segments("packed"), SCALE)
        if choice == "cudnn":
            with pytest.raises(ValueError, match=message):
                flash.attend(execution, *(x.astype(jnp.bfloat16) for x in (q, k, v)), draw_segments("packed"), SCALE)


@pytest.mark.parametrize("chunk", [7, 4], ids=["unrolled", "scanned"])
def test_without_segments_attention_is_causal_over_the_row(chunk):
    q, k, v, g = draw()
    got, want = core(chunk)(q, k, v, None, g), core(chunk)(q, k, v, draw_segments("one document"), g)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


VARIANTS = {
    "V3": {},
    "no query latent": {"query_latent": 0},
    "YaRN": {"yarn": {"enabled": True, "factor": 4.0, "original_length": 16}, "rope_base": 100.0},
}

LAYER = 1  # of the three that have pages


@functools.cache
def layer(variant):
    """One attention layer and its jitted expanded form; large weights make its softmax far from uniform."""
    tree = small.config_dict()
    for key, value in VARIANTS[variant].items():
        tree.model[key].update(value) if key == "yarn" else tree.model.update({key: value})
    tree.model.init_std = 0.2
    tree.execution.attention_chunk = 16
    config = resolve(small.from_config_dict(tree), "cpu", 1)
    attention = Attention(config.model, nnx.Rngs(params=1))

    def run_expanded(attention, x_BSD, positions_BS, segment_ids_BS):
        table = rotary_table(config.model, positions_BS)
        return expanded(config.execution, table, segment_ids_BS)(attention, x_BSD, None)[0]

    def run_over_pages(attention, x_BSD, pages, tables_BJ, positions_BS, valid_BS):
        """A few tokens in the absorbed form; more of them, packed, as prefill does it."""
        batch, length, width = x_BSD.shape
        if length <= 4:
            attend = absorbed(config.model, tables_BJ, positions_BS, valid_BS)
            y_BSD, cache = attend(attention, x_BSD, LayerPages(pages, LAYER))
            return y_BSD, cache.pages
        x_1TD = jnp.pad(x_BSD.reshape(1, -1, width), ((0, 0), (0, 256 - batch * length), (0, 0)))
        sequences = Sequences.of(tables_BJ, positions_BS[:, 0], valid_BS.sum(1, dtype=jnp.int32), 256)
        attend = expanded_over_pages(config.model, config.execution, sequences, continues=False, rows=Rows(0, 0))
        y_1TD, cache = attend(attention, x_1TD, LayerPages(pages, LAYER))
        return y_1TD[0, : batch * length].reshape(x_BSD.shape), cache.pages

    apart = nnx.clone(attention)
    apart.kv_b_CNX = nnx.Param(UpProjection.of(config.model, attention.kv_b_CNX[...]))
    return (
        config.model,
        functools.partial(nnx.jit(run_expanded), attention),
        functools.partial(nnx.jit(run_over_pages), apart),
    )


def draw_stream(model, length=40):
    return jax.random.normal(jax.random.key(2), (B, length, model.width)), np.tile(
        np.arange(length, dtype=np.int32), (B, 1)
    )


def draw_pages(model, num_pages, filler=np.nan):
    """Pages of three layers, of which `LAYER` runs, full of something that is no entry."""
    return jnp.full((3, num_pages, 64, model.kv_latent + model.rotary_dim), filler, jnp.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_absorbed_equals_expanded(variant):
    """A prompt, a draft of two and single tokens over a cache of C + R values per token, within 1e-5 relative."""
    model, run_expanded, run_over_pages = layer(variant)
    x_BSD, positions_BS = draw_stream(model, length=80)
    want_BSD = run_expanded(x_BSD, positions_BS, np.ones_like(positions_BS))
    pages, tables_BJ = draw_pages(model, 2 * B), contiguous_tables(B, 2, devices=1)
    parts, valid_BS = [], np.ones((B, 80), bool)
    for new in (slice(0, 76), slice(76, 77), slice(77, 79), slice(79, 80)):
        part, pages = run_over_pages(x_BSD[:, new], pages, tables_BJ, positions_BS[:, new], valid_BS[:, new])
        parts.append(part)
    error = np.linalg.norm(jnp.concatenate(parts, axis=1) - want_BSD, axis=-1) / np.linalg.norm(want_BSD, axis=-1)
    assert error.max() <= 1e-5
    written = np.isfinite(np.asarray(pages)).all(-1).reshape(3, B, 128)
    assert written[LAYER, :, :80].all() and written.sum() == 80 * B, "other rows, or other layers, are written"


def test_pages_in_any_order_give_the_numbers_of_pages_in_a_row():
    """To the bit; page numbers that no sequence reads may be anything, and what lies there leaks nowhere."""
    model, _, run = layer("V3")
    x_BSD, positions_BS = draw_stream(model, length=90)
    contiguous, row = draw_pages(model, 4 * B, 0.0), contiguous_tables(B, 4, devices=1)
    scattered = draw_pages(model, 4 * B)
    shuffled = np.random.default_rng(0).permutation(4 * B)[: 2 * B].reshape(B, 2).astype(np.int32)
    foreign = np.array([[-7, 10**9]] * B, np.int32)
    valid_BS = np.ones((B, 90), bool)
    for new in (slice(0, 87), slice(87, 88), slice(88, 90)):
        rest = positions_BS[:, new], valid_BS[:, new]
        want, contiguous = run(x_BSD[:, new], contiguous, row, *rest)
        got, scattered = run(x_BSD[:, new], scattered, np.concatenate([shuffled, foreign], axis=1), *rest)
        np.testing.assert_array_equal(got, want)
    assert shuffled.ravel().tolist() != sorted(shuffled.ravel())
    untouched = np.isnan(np.asarray(scattered)).all(axis=(2, 3))[LAYER]
    assert untouched.sum() == 2 * B and not untouched[shuffled].any()


@pytest.mark.parametrize("length", [1, 3, 40])
def test_a_token_that_is_not_valid_is_written_nowhere(length):
    """A row without a sequence owns no page: its table may name the pages of others. Nor does a page it lacks exist."""
    model, _, run = layer("V3")
    x_BSD, positions_BS = draw_stream(model, length)
    pages, tables_BJ = draw_pages(model, 2), np.array([[1]] + [[0]] * (B - 1), np.int32)
    valid_BS = np.zeros((B, length), bool)
    valid_BS[0] = True
    y_BSD, after = run(x_BSD, pages, tables_BJ, positions_BS, valid_BS)
    written = np.isfinite(np.asarray(after)).all(-1)
    assert written.sum() == length and written[LAYER, 1, :length].all() and np.isfinite(y_BSD[0]).all()
    _, after = run(x_BSD, pages, tables_BJ, positions_BS + 64, valid_BS)
    assert not np.isfinite(after).any(), "a position behind the table is written somewhere"


def test_only_differences_of_positions_matter():
    model, run, _ = layer("V3")
    x_BSD, positions_BS = draw_stream(model)
    ones = np.ones_like(positions_BS)
    near, far = run(x_BSD, positions_BS, ones), run(x_BSD, positions_BS + 1000, ones)
    # FP32 angles near 1000 are 6e-5 apart
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-4 * np.abs(near).max())
    reversed_BSD = run(x_BSD, positions_BS[:, ::-1], ones)
    assert np.abs(reversed_BSD - near).max() > 0.05 * np.abs(near).max()  # they do matter
