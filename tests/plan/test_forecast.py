"""What a person reads of a forecast, and its drawing; memory beside the state is given, so nothing is traced."""

import dataclasses
import json
import re

import pytest

from configs import deepseek_v3
from deepseek_jax.config import from_config_dict
from deepseek_jax.plan import adapters, decode, estimate, forecast, report, search
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.counts import bytes_per_device, count, state_of
from deepseek_jax.plan.liveness import Living
from deepseek_jax.plan.meshes import require_fit
from deepseek_jax.plan.run import Placement, make_plan
from experiments import plan_drawing
from tests.support import small

LIVING = 4_000_000_000


def config_of(**mesh):
    tree = small.config_dict()
    tree.mesh.update({"data": -1, "node": 1, "expert": 1} | mesh)
    return from_config_dict(tree)


def planned(monkeypatch, chip="h200", **mesh):
    monkeypatch.setattr(forecast, "gradient_bytes", lambda config, mesh: LIVING)
    config = config_of(**mesh)
    fit, state = require_fit(config, 8), state_of(config)
    on = Placement(fit, bytes_per_device(fit.config, state, fit.mesh), CHIPS[chip])
    return forecast.forecast(on, state, True, lambda text: None), state


def test_every_figure_says_how_it_was_found(monkeypatch):
    found, state = planned(monkeypatch, expert=4)
    held = found.held["weights"] + found.held["moments"]
    assert found.traced == LIVING + held
    text = "\n".join(forecast.lines(found, count(found.fit.config, state)))
    for wanted in ("a step on 8 devices of h200 (data 2 x expert 4)", "traced", "of 141 GB", "exchange over expert",
                   "shares of peak measured on H100 and H200", "chip-hours"):  # fmt: skip
        assert wanted in text, wanted
    assert f"{found.time.total * 1e3:,.2f} ms of " in text and "0.00 s" not in text  # a small step is not nothing
    values = json.loads(json.dumps(forecast.record(found, count(found.fit.config, state))))
    assert values["gradient_traced"] == LIVING
    parts = {name: seconds for name, seconds in values["time_computed"].items() if name not in ("total", "travel")}
    assert values["time_computed"]["total"] == pytest.approx(sum(parts.values()))
    larger = dataclasses.replace(found, update=2 * LIVING)  # of an average on the host, between two steps
    assert larger.traced == 2 * LIVING
    assert "update of the average" in "\n".join(forecast.lines(larger, count(found.fit.config, state)))
    other, _ = planned(monkeypatch, chip="gb300")
    assert "assumed, not measured" in "\n".join(forecast.lines(other, count(other.fit.config, state)))


def test_sizes_of_a_small_model_are_not_nothing(monkeypatch):
    found, state = planned(monkeypatch, expert=4)
    found = dataclasses.replace(found, living=40_000_000)
    counts = count(found.fit.config, state)
    memory = next(line for line in forecast.lines(found, counts) if line.startswith("  weights"))
    assert memory.split()[1:3] == [f"{found.held['weights'] / 1e6:.2f}", "MB"]
    sent = max(found.sent, key=lambda sent: sent.bytes)
    line = next(line for line in forecast.lines(found, counts) if f"{sent.kind} over {sent.axis}" in line)
    unit = 1e6 if sent.bytes >= 1e6 else 1e3
    assert f" {sent.bytes / unit:.1f} {'MB' if unit == 1e6 else 'kB'} " in line
    plan = make_plan(found.fit.config, 8, None, lambda text: None, False)
    adapted = adapters.plan_adapters(found.fit.config, adapters.parse("4:attention"), 8, None)
    decoded = decode.decoding(from_config_dict(small.config_dict()), 1, CHIPS["h200"], state)
    assert "read, MB" in "\n".join(decode.lines(decoded, 256))
    told = forecast.lines(found, counts), report.lines(plan), adapters.lines(adapted), decode.lines(decoded, 256)
    for text in told:
        assert not re.search(r"\b0\.00 G|\b0\.0 days", "\n".join(text)), text
    large = report.lines(make_plan(from_config_dict(deepseek_v3.get_config()), 128, None, lambda text: None, False))
    assert sum(" GiB" in line for line in large) > 3 and not any("MiB" in line for line in large)


def test_devices_that_share_sequences_send_latents(monkeypatch):
    """Half of the tokens on each, so half of the time of a layer, and keys and values of the whole row twice."""
    alone, _ = planned(monkeypatch, data=4, expert=2)
    shared, _ = planned(monkeypatch, data=2, context=2, expert=2)
    assert {(s.axis, s.kind) for s in shared.sent} - {(s.axis, s.kind) for s in alone.sent} == {
        ("context", "latents"), ("context", "weights"), ("context", "gradients"),
    }  # fmt: skip
    assert alone.time.forward < shared.time.forward < 1.1 * alone.time.forward


def test_a_step_that_does_not_fit_is_refused_and_the_next_number_named(monkeypatch):
    found, state = planned(monkeypatch)
    forecast.require_memory(found, state, lambda text: None)
    monkeypatch.setattr(estimate, "living", lambda config, mesh: Living(LIVING, 10**6))
    tight = dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=int(1e9)))
    with pytest.raises(ValueError, match="small does not fit on 8 h200: a device needs 4 GB and has 1; no number"):
        forecast.require_memory(tight, state, lambda text: None)
    monkeypatch.setattr(estimate, "living", lambda config, mesh: Living(10**8, 10**6))
    with pytest.raises(ValueError, match=r"the nearest that fits: --topology=h200:8 .*--config\.execution\.remat=full"):
        forecast.require_memory(tight, state, lambda text: None)


def test_a_table_of_choices_has_one_unit_of_time(monkeypatch):
    """That of the fastest, so that none is told as nothing: steps below and above a second stand in one column."""
    found, state = planned(monkeypatch)
    steps = [dataclasses.replace(found.time, idle=found.time.idle + total - found.time.total) for total in (0.02, 1.25)]
    choices = [search.Choice(found.fit, 1e9, time) for time in steps]
    head, *rows = forecast.choices_table(choices, CHIPS["h200"], count(found.fit.config, state))
    assert [row.split()[:2] for row in rows] == [["20.00", "ms"], ["1,250.00", "ms"]]
    assert {len("step") + head.index("step"), *(row.index("ms") + 2 for row in rows)} == {15}


def test_the_next_number_begins_anywhere_and_ends_at_the_pod(monkeypatch):
    monkeypatch.setattr(estimate, "living", lambda config, mesh: Living(10**8, 10**6))
    config = config_of()
    memory = estimate.Memory(state_of(config), lambda text: None)
    found = search.nearest_that_fits(config, 1, CHIPS["h200"], memory)
    assert found is not None and found.num_devices == 1
    assert search.nearest_that_fits(config, 512, CHIPS["v6e"], memory) is None


def test_the_next_number_may_have_other_stages_but_the_configs_own_come_first(monkeypatch):
    monkeypatch.setattr(estimate, "living", lambda config, mesh: Living(10**8, 10**6))
    config = config_of(pipe=2)
    memory = estimate.Memory(state_of(config), lambda text: None)
    found = search.nearest_that_fits(config, 8, CHIPS["h200"], memory)
    assert found is not None and found.mesh.shape["pipe"] == 2
    alone = search.nearest_that_fits(config_of(), 8, CHIPS["h200"], memory)
    assert alone is not None and memory.of(alone) < memory.of(found)
    tight = dataclasses.replace(CHIPS["h200"], memory=int(memory.of(alone)))
    other = search.nearest_that_fits(config, 8, tight, memory)
    assert other is not None and (other.num_devices, other.mesh.shape["pipe"]) == (8, 1)
    assert other.changes["mesh.pipe"] == 1


def test_a_pipeline_waits_and_sends_activations(monkeypatch):
    """Two stages on four devices each: weights of the stages cross `pipe` once a step, their gradients back."""
    found, _ = planned(monkeypatch, pipe=2, expert=4)
    assert found.time.idle > 0
    of_pipe = {sent.kind: sent.bytes for sent in found.sent if sent.axis == "pipe"}
    assert set(of_pipe) == {"activations", "weights", "gradients"} and of_pipe["weights"] == of_pipe["gradients"]
    assert found.traced == LIVING + found.held["weights"] + found.held["moments"]
    assert found.held["stages"] == found.held["gradients"]


def test_a_drawing_has_both_panels_or_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(plan_drawing, "gradient_bytes", lambda config, mesh: LIVING)
    config = config_of(expert=4)
    plan_drawing.draw(config, state_of(config), tmp_path / "devices.png")
    assert (tmp_path / "devices.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plan_drawing, "COUNTS", (7,))
    with pytest.raises(ValueError, match="works on no power of two of devices from 8 to 2,048; nothing is drawn"):
        plan_drawing.draw(config, state_of(config), tmp_path / "no.png")
