"""The attention core over packed sequences against FP64, and merged over parts of the keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo

from configs.tiny import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.model import packed
from deepseek_jax.model.packed import Attended, Spans
from tests.support.cudnn import causal_attention

EXECUTION = dataclasses.replace(from_config_dict(get_config()).execution, attention="xla")
QUERIES = [3, 0, 130, 17]  # tokens of each sequence; 256 in the array
KEYS = [70, 5, 0, 100]
SCALE = 0.3


def spans(lengths):
    lengths = np.array(lengths, np.int32)
    return Spans(jnp.array(np.cumsum(lengths) - lengths, jnp.int32), jnp.array(lengths))


def inputs(num_keys):
    rng = np.random.default_rng(0)
    return tuple(
        jnp.array(rng.normal(size=size), jnp.float32) for size in ((256, 2, 8), (num_keys, 2, 8), (num_keys, 2, 6))
    )


def reference(q, k, v, queries, keys, causal):
    """Every sequence by itself in FP64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros((256, 2, 6)), np.full((256, 2), -np.inf)
    first, first_key = 0, 0
    for num, num_keys in zip(queries, keys, strict=True):
        for i in range(num):
            seen = slice(first_key, first_key + (i + 1 if causal else num_keys))
            if num_keys:
                scores = np.einsum("nq,mnq->nm", q[first + i], k[seen]) * SCALE
                lse[first + i] = np.log(np.exp(scores).sum(-1))
                out[first + i] = np.einsum("nm,mnh->nh", np.exp(scores - lse[first + i][:, None]), v[seen])
        first, first_key = first + num, first_key + num_keys
    return out, lse


@functools.partial(jax.jit, static_argnames="causal")
def attended(q, k, v, queries, keys, causal):
    return packed.attend(EXECUTION, q, k, v, queries, keys, SCALE, causal=causal, rows=packed.Rows(0, 0))


def test_each_sequence_attends_to_its_own_keys():
    """Causal over itself, or to all keys of another array; without keys the output is 0."""
    for num_keys, keys, causal in ((256, QUERIES, True), (256, KEYS, False), (512, [300, 0, 140, 60], False)):
        q, k, v = inputs(num_keys)
        out, lse = attended(q, k, v, spans(QUERIES), spans(keys), causal)
        for got, want in zip((out, lse), reference(q, k, v, QUERIES, keys, causal), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-6)


def test_parts_of_the_keys_are_merged():
    """Part one and part two of each sequence's keys, some of them empty, and both."""
    q, k, v = inputs(256)
    first = attended(q, k, v, spans(QUERIES), spans(KEYS), False)
    start = np.cumsum(KEYS) - np.array(KEYS)
    halves = np.array([[70, 0, 0, 40], [0, 5, 0, 60]], np.int32)
    starts = start.astype(np.int32), (start + halves[0]).astype(np.int32)
    parts = [attended(q, k, v, spans(QUERIES), Spans(*both), False) for both in zip(starts, halves, strict=True)]
    merged = packed.merge(*(Attended(*part) for part in parts))
    for got, want in zip(merged, first, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.isneginf(merged.lse_TN[3:133]).all() and not merged.out_TNH[3:133].any()


def with_cudnn(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", causal_attention)
    return dataclasses.replace(EXECUTION, attention="cudnn")


def test_rows_for_cudnn_are_the_sequences(monkeypatch):
    """Each sequence with tokens has a row; the others, and the filling, have none."""
    execution = with_cudnn(monkeypatch)
    q, k, v = inputs(256)
    where = spans(QUERIES)
    for rows in (packed.Rows(4, 256), packed.Rows(3, 131)):
        run = jax.jit(functools.partial(packed.attend, execution, scale=SCALE, causal=True, rows=rows))
        for got, want in zip(
            run(q, k, v, where, where), reference(q, k, v, QUERIES, QUERIES, causal=True), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_sequence_alone_is_its_row_as_it_lies(monkeypatch):
    """Nothing is gathered, wherever among the sequences it stands; what fills the array up is made of numbers."""
    execution, alone = with_cudnn(monkeypatch), [0, 130, 0]
    q, k, v = inputs(256)
    run = jax.jit(functools.partial(packed.attend, execution, scale=SCALE, causal=True, rows=packed.Rows(1, 256)))
    found = run(q, k, v, spans(alone), spans(alone))
    for got, want in zip(found, reference(q, k, v, alone, alone, causal=True), strict=True):
        np.testing.assert_allclose(got[:130], want[:130], atol=2e-6)
        assert np.isfinite(got).all()
    assert "gather" not in run.lower(q, k, v, spans(alone), spans(alone)).as_text()
