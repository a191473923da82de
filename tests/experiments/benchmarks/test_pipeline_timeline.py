"""`experiments.benchmarks.pipeline_timeline` finds the passes of a pipeline in a trace, and how long devices idle."""

import pytest

from experiments.benchmarks import pipeline_timeline as pipe

BRANCH = "jit(run)/while/body/cond/branch_1_fun/"


def events():
    """Device 0 runs forward in its first tick; device 1 in its second, while device 0 runs backward and adds."""
    return {
        0: [
            (0, 5e6, "cast", "jit(run)/convert"),
            (5e6, 4e6, "matmul", BRANCH + "jvp(attention)/dot"),
            (9.01e6, 1e6, "matmul", BRANCH + "jvp(ffn)/dot"),
            (10e6, 5e6, "ncclDevKernel_SendRecv", "jit(run)/while/body/ppermute"),
            (15e6, 6e6, "matmul", BRANCH + "transpose(jvp(ffn))/dot"),
            (21e6, 1e6, "add", BRANCH + "add"),
        ],
        1: [
            (4e6, 6e6, "ncclDevKernel_SendRecv", "jit(run)/while/body/ppermute"),
            (15e6, 5e6, "matmul", BRANCH + "jvp(ffn)/dot"),
            (20e6, 5e6, "loss", BRANCH + "jvp(head)/dot"),
        ],
    }


def test_spans_and_their_use():
    """Neighbours of one kind are one span; what is before the first tick does not count."""
    ticks, devices = pipe.spans_of(events())
    assert ticks == (5.0, 25.0)
    assert [span.kind for span in devices[0]] == [pipe.OTHER, pipe.FORWARD, pipe.TRANSFER, pipe.BACKWARD, pipe.OTHER]
    assert devices[0][1][1:] == pytest.approx((5.0, 10.01))
    assert pipe.use_of(devices[0], ticks) == pytest.approx((20.0, 12.01, 5.01, 6.0))
    assert pipe.use_of(devices[1], ticks) == pytest.approx((20.0, 10.0, 5.0, 5.0))
    assert "computes 10.0 (forward 5.0, backward 5.0), idle 50.0%" in pipe.describe(1, pipe.use_of(devices[1], ticks))


def test_work_side_by_side_counts_once():
    spans = [pipe.Span(pipe.FORWARD, 0.0, 4.0), pipe.Span(pipe.BACKWARD, 2.0, 6.0), pipe.Span(pipe.TRANSFER, 0.0, 9.0)]
    assert pipe.use_of(spans, (0.0, 10.0)).computes == 6.0


def test_what_is_written_is_read_again_and_drawn(tmp_path):
    ticks, devices = pipe.spans_of(events())
    path = tmp_path / "spans.json"
    path.write_text(pipe.as_json(ticks, devices))
    again, found = pipe.from_json(path)
    assert again == ticks and {d: [span.kind for span in s] for d, s in found.items()} == {
        d: [span.kind for span in s] for d, s in devices.items()
    }
    (axes,) = pipe.draw(again, found, "two devices").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["device 0\nidle 39.9%", "device 1\nidle 50.0%"]
    path.write_text('{"ticks": [0, 1], "devices": {"0": [["sleep", 0, 1]]}}')
    with pytest.raises(ValueError, match="has spans of .'sleep'.; the kinds are forward"):
        pipe.from_json(path)
    path.write_text('{"ticks": [0]}')
    with pytest.raises(ValueError, match="is not what --json wrote"):
        pipe.from_json(path)


def test_a_trace_without_ticks_is_refused():
    with pytest.raises(ValueError, match="no kernel of the trace belongs to a tick"):
        pipe.spans_of({0: [(0, 1e6, "matmul", "jit(run)/jvp(ffn)/dot")]})
