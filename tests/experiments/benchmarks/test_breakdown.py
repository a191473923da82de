"""`experiments.benchmarks.breakdown` puts the time of a program where its scopes say, and counts nothing twice."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import breakdown


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(run)/jvp()/while/body/attention/attention_core/dot_general", ("attention_core", "forward")),
        ("jit(run)/transpose(jvp(attention))/while/body/checkpoint/mul", ("attention", "backward")),
        ("jit(run)/transpose(jvp())/checkpoint/rematted_computation/route/top_k", ("route", "recomputed")),
        ("jit(run)/jvp()/while/body/add", ("other", "forward")),
        ("jit(run)/headless/add", ("other", "forward")),
        ("jit(run)/jvp(experts)/gather", ("experts", "forward")),
        ("jit(run)/gather/all_gather", ("gather", "forward")),
    ],
)
def test_place(op_name, expected):
    assert breakdown.place(op_name) == expected


def test_events_are_summed_per_step_without_the_loops_around_them():
    program = """
  %body.1 = f32[8] fusion(%x), metadata={op_name="jit(f)/jvp(ffn)/while/body/dot_general"}
  ROOT %while.2 = (s32[], f32[8]) while(%x), body=%b, metadata={op_name="jit(f)/while"}
"""
    events = [
        ("body.1", "kernel", 2e6),
        ("while.2", "while.2", 5e6),
        ("body.1", "kernel", 4e6),
        ("unknown", "copy", 1e6),
    ]
    found = breakdown.collect(iter(events), program, num_steps=2)
    assert found == [
        breakdown.Event("ffn", "forward", "kernel", 3.0, 1.0),
        breakdown.Event("other", "forward", "copy", 0.5, 0.5),
    ]
    assert "ffn" in breakdown.table(found) and "85.7%" in breakdown.table(found)
    assert "in 0 others" in breakdown.kernel_table(found) and "in 1 others" in breakdown.kernel_table(found, 1)


def test_a_step_is_traced():
    """Both scopes of a program have time, and both passes."""

    def loss(w, x):
        with jax.named_scope("head"):
            y = x @ w
        with jax.named_scope("experts"):
            return jnp.tanh(y[:250] @ w[:, :250]).sum()

    w = jnp.ones((1000, 1000))
    step = jax.jit(jax.grad(loss)).lower(w, w).compile()
    jax.block_until_ready(step(w, w))
    events = breakdown.trace_steps(lambda: jax.block_until_ready(step(w, w)), 2, step.as_text())
    found = {(event.scope, event.direction) for event in events if event.milliseconds > 0}
    assert found >= {(scope, direction) for scope in ("head", "experts") for direction in ("forward", "backward")}
