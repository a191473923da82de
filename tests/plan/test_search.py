"""A search tries the same ways whatever mesh the config has, and hides no error among them."""

import dataclasses

import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.plan import estimate, search
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.counts import state_of
from deepseek_jax.plan.liveness import Living
from deepseek_jax.plan.meshes import as_fit, find_fit
from tests.support import small


def config_of(pipe, **changes):
    tree = small.config_dict()
    tree.mesh.update({"pipe": pipe, "data": -1, "node": 1, "expert": 1})
    return from_config_dict(tree).with_(**changes)


def test_a_config_with_a_pipeline_is_searched_like_one_without():
    """No way twice, meshes without a pipeline among them, and the flags of each make it."""
    ways = {}
    for pipe in (1, 2):
        config = config_of(pipe)
        fits = [*search.candidates(config, 4), *search.pipelines(config, 4, CHIPS["h200"])]
        ways[pipe] = {fit.config for fit in fits}
        assert len(ways[pipe]) == len(fits)
        assert {fit.mesh.shape["pipe"] for fit in fits} == {1, 2, 4}
        for fit in fits:
            made = as_fit(config, 4, fit.changes)
            assert made is not None and (made.config, made.mesh) == (fit.config, fit.mesh)
    assert ways[1] == ways[2]


def test_an_error_of_an_estimate_is_no_refusal(monkeypatch):
    def broken(config, mesh):
        raise ValueError("an error of ours")

    monkeypatch.setattr(estimate, "living", broken)
    config = config_of(1)
    with pytest.raises(ValueError, match="an error of ours"):
        search.search(config, 4, CHIPS["h200"], state_of(config), lambda text: None)


def test_a_pipeline_must_fit_with_the_error_of_its_estimate(monkeypatch):
    monkeypatch.setattr(estimate, "living", lambda config, mesh: Living(10**8, 10**6))
    config = config_of(2)
    memory = estimate.Memory(state_of(config), lambda text: None)
    fit = find_fit(config, 4)
    need = memory.of(fit)
    for factor, does_fit in ((1.03, False), (1.05, True)):
        chip = dataclasses.replace(CHIPS["h200"], memory=int(factor * need))
        assert search._fits(fit, chip, memory) is does_fit


def test_one_trace_alone_has_mtp_and_every_estimate_what_it_needs(monkeypatch):
    config = config_of(1)
    assert config.model.num_mtp_layers
    needs = {}
    for of_mtp in (2 * 10**8, 3 * 10**8):
        traced = []

        def fake(config, mesh, of_mtp=of_mtp, traced=traced):
            traced.append(config.model.num_mtp_layers)
            most = 10**8 + 10**6 * config.training.micro_batch_size + of_mtp * bool(config.model.num_mtp_layers)
            return Living(most, 10**6)

        monkeypatch.setattr(estimate, "living", fake)
        memory = estimate.Memory(state_of(config), lambda text: None)
        needs[of_mtp] = [memory.of(fit) for fit in search.candidates(config, 2)]
        assert len(traced) == len(set(traced)) + 3 and traced.count(config.model.num_mtp_layers) == 1
    least, most = needs.values()
    assert len(set(least)) > 2 and {after - before for before, after in zip(least, most, strict=True)} == {10**8}


def test_sequences_that_need_more_than_their_number_of_ones_are_not_taken_for_less(monkeypatch):
    """With few a step may need most before all gradients are there: V3 on 128 devices 5, 17, 71 GB for 1, 2, 8."""
    traced = {1: 10**9, 2: 3 * 10**9, 8: 22 * 10**9}
    monkeypatch.setattr(
        estimate, "living", lambda config, mesh: Living(traced[config.training.micro_batch_size], 10**6)
    )
    memory = estimate.Memory(state_of(config_of(1)), lambda text: None)
    full = [fit for fit in search.candidates(config_of(1), 1) if fit.config.execution.remat == "full"]
    needs = {fit.config.training.micro_batch_size: memory.of(fit) for fit in full}
    beyond = {n: needs[n] - needs[1] for n in (2, 4, 8)}
    assert beyond == {2: pytest.approx(2 * 10**9), 4: pytest.approx(9 * 10**9), 8: pytest.approx(21 * 10**9)}


def test_a_search_tries_pipelines_for_a_config_that_offloads(monkeypatch):
    """The search has its own recomputations, with which a pipeline goes."""
    monkeypatch.setattr(estimate, "living", lambda config, mesh: Living(10**6, 10**3))
    config = config_of(1, execution={"remat": "offload"})
    found = search._pipelines_that_fit(config, 4, CHIPS["h200"], estimate.Memory(state_of(config), print), print)
    assert found and {fit.config.execution.remat for fit in found} <= set(search.REMATS)


def test_what_no_pipeline_can_have_is_refused_before_any_table(monkeypatch):
    monkeypatch.setattr(estimate, "living", lambda config, mesh: Living(10**6, 10**3))
    monkeypatch.setattr(search, "pipelines", None)
    config, said = config_of(1, execution={"gather": "kept"}), []
    found = search.search(config, 4, CHIPS["h200"], state_of(config), said.append)
    assert {choice.fit.mesh.shape["pipe"] for choice in found} == {1}
    assert said[-1].startswith("no pipeline is tried: config.execution.gather = 'kept'")
