"""The table of `docs/memory.md` says the smallest number of devices only where the record proves it."""

from deepseek_jax.plan.chips import CHIPS
from experiments.benchmarks import memory_table

CHIP = CHIPS["v5p"]


def assigned(fit, does_fit):
    execution = fit.config.execution
    key = {"config": fit.config.name, "precision": execution.precision, "remat": execution.remat, "chip": CHIP.name}
    return key | {
        "devices": fit.num_devices,
        "does_fit": does_fit,
        "step_memory": {"total": 2**30 * 80, "source": "assigned"},
    }


def search(config, fits_on):
    """Return the (devices, remat) that the compiler is asked about, in this order, and the cell of the table."""
    records, order = [], []
    for fit in memory_table.missing(config, CHIP, records):
        cell = memory_table.tpu_cell(config, CHIP, records)
        found = any(record["does_fit"] for record in records)
        assert cell.startswith("at most 512") if found else cell == memory_table.NOT_ASKED
        order.append((fit.num_devices, fit.config.execution.remat))
        records.append(assigned(fit, fit.num_devices >= fits_on.get(fit.config.execution.remat, 1000)))
    return order, memory_table.tpu_cell(config, CHIP, records)


def test_the_smallest_number_is_searched_for():
    config = memory_table.load("deepseek_v3")  # 128, 256 and 512 devices hold the state
    assert search(config, {"selective": 128}) == ([(128, "selective")], "128: 80.0 GiB each")
    order, cell = search(config, {"selective": 512})
    assert order == [(128, "selective"), (512, "selective"), (256, "selective")]
    assert cell == "512: 80.0 GiB each"


def test_full_recomputation_comes_after_the_config_as_it_is():
    config = memory_table.load("deepseek_v3")
    shipped = [(128, "selective"), (512, "selective")]
    order, cell = search(config, {"full": 256})
    assert order == [*shipped, (128, "full"), (512, "full"), (256, "full")]
    assert cell == "256, remat full: 80.0 GiB each"
    assert search(config, {}) == ([*shipped, (128, "full"), (512, "full")], "none")


def test_a_cell_says_what_is_no_assignment_of_buffers():
    config = memory_table.load("tiny")
    record = assigned(next(memory_table.missing(config, CHIP, [])), does_fit=True)
    record["step_memory"]["source"] = "compiled"
    assert memory_table.tpu_cell(config, CHIP, [record]) == "1: 80.0 GiB each (whole compilation)"


def test_cards_are_numbers_that_the_code_accepts():
    config = memory_table.load("deepseek_v3")
    state = memory_table.abstract(config)
    assert [memory_table.card_cell(config, state, CHIPS[card]) for card in memory_table.CARDS.values()] == [
        "256",
        "128",
    ]
