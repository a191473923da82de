"""Which config fits which chip: `python -m experiments.benchmarks.memory_table --compile`.

Without --compile it prints the table of `docs/memory.md` from the record, `experiments/results/plan/memory.json`. With
it, it first lets the compiler of every kind of TPU assign the buffers of every config's training step on several
numbers of devices (`plan.assignment`), some 100 s of a core for V3. What the record has already
is not asked again, so it can be stopped; delete the record to begin anew. Numbers of devices are powers of two up to
512 that the code accepts; cells for NVIDIA cards are computed.
"""

import functools
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.plan.chips import CHIPS, GIB, Chip, prepare
from deepseek_jax.plan.counts import bytes_per_device, count, state_of
from deepseek_jax.plan.meshes import Fit, find_fits
from deepseek_jax.plan.report import memory_record
from deepseek_jax.plan.run import compile_fit
from deepseek_jax.training.state import State
from experiments import command
from pallas_kernels.bench.records import provenance, write

COMPILE = flags.DEFINE_bool("compile", False, "Ask the compilers for what the record lacks.")
NOT_ASKED = "-"
WHOLE = "whole compilation"  # says more than the assignment of buffers
MOST_DEVICES = 512  # of the table; experiments.plan takes more, and other numbers
RECORD = Path(__file__).parents[1] / "results" / "plan" / "memory.json"

CONFIGS = {
    "tiny": "V3 on two CPU cores",
    "v3_300m": "comparing precisions",
    "moe_1b": "an ablation shape",
    "v3_5b": "V3 on one card",
    "deepseek_v2_lite": "V2-Lite, 16B",
    "moonlight_16b": "Moonlight, V3 on one node",
    "deepseek_v2": "V2 and V2.5, 236B",
    "deepseek_v3": "V3 and R1, 671B",
    "mlperf_v6_deepseek_v3": "V3 as MLPerf Training v6 trains it",
}
TPUS = ("v5p", "v6e", "tpu7x")
CARDS = {"80 GB": "h100", "141 GB": "h200"}
# In this order: the config as it is written, then with all of a layer computed once more in the backward pass.
VARIANTS: tuple[dict[str, dict[str, str]], ...] = ({}, {"execution": {"remat": "full"}})


@functools.cache
def load(name: str) -> Config:
    """Return a config of `configs/` as it is shipped, but in BF16 where it says FP8: then TPUs and cards compare."""
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    return config.with_(execution={"precision": "bf16"}) if config.execution.precision == "fp8" else config


@functools.cache
def abstract(config: Config) -> State:
    """Return `state_of` of a config, made once."""
    return state_of(config)


def candidates(config: Config, state: State, memory: float, most: int) -> list[Fit]:
    """Return the powers of two that the code accepts as devices, and whose computed bytes are at most `memory`."""
    fits = (fit for fit in find_fits(config, min(most, MOST_DEVICES)) if fit.num_devices.bit_count() == 1)
    return [fit for fit in fits if sum(bytes_per_device(fit.config, state, fit.mesh).values()) <= memory]


def compile_missing(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a record, also appended to `records`, for every step that a compiler had to be asked about."""
    for chip in (CHIPS[name] for name in TPUS):
        for name in reversed(CONFIGS):  # the largest are the ones that people ask about
            for fit in missing(load(name), chip, records):
                records.append(_asked(fit, chip))
                yield records[-1]


def missing(config: Config, chip: Chip, records: list[dict[str, Any]]) -> Iterator[Fit]:
    """Yield what to ask next to know the smallest fit; each result must be in `records` before the next."""
    state = abstract(config)
    for changes in VARIANTS:
        fits = candidates(config.with_(**changes), state, chip.room, chip.devices * chip.most_chips)
        while (fit := next_probe(fits, chip, records)) is not None:
            yield fit
        if any(_known(fit, chip, records) for fit in fits):
            return


def next_probe(fits: list[Fit], chip: Chip, records: list[dict[str, Any]]) -> Fit | None:
    """Return the fit to compile next in the search for the smallest that fits; None if it is known, or that none does.

    The smallest comes first, then the largest, then those between. More devices never need more memory each, so one
    that is refused speaks for all smaller ones.
    """
    known = [_known(fit, chip, records) for fit in fits]
    unknown = [fit for fit, does_fit in zip(fits, known, strict=True) if does_fit is None]
    if not unknown:
        return None
    if False not in known:
        return unknown[0]
    return unknown[len(unknown) // 2] if True in known else unknown[-1]


def _known(fit: Fit, chip: Chip, records: list[dict[str, Any]]) -> bool | None:
    """Return whether a fit does fit by what is in the record, or None."""
    key = _key(fit, chip)
    same = [r for r in records if all(r[name] == key[name] for name in key if name != "devices")]
    if any(r["does_fit"] and r["devices"] <= fit.num_devices for r in same):
        return True
    return False if any(not r["does_fit"] and r["devices"] >= fit.num_devices for r in same) else None


def _key(fit: Fit, chip: Chip) -> dict[str, Any]:
    execution = fit.config.execution
    return {
        "config": fit.config.name,
        "precision": execution.precision,
        "remat": execution.remat,
        "chip": chip.name,
        "devices": fit.num_devices,
    }


def _asked(fit: Fit, chip: Chip) -> dict[str, Any]:
    step = compile_fit(fit, chip, lambda text: print(text, file=sys.stderr))
    versions = {"libtpu": importlib.metadata.version("libtpu")}
    where = provenance("experiments.benchmarks.memory_table", f"{fit.num_devices} x {chip.name}, absent")
    return _key(fit, chip) | memory_record(fit, chip, step) | versions | where


def table(records: list[dict[str, Any]]) -> str:
    """Return the Markdown table: a row per config, a column per TPU of which the record has steps, and the cards."""
    tpus = [chip for chip in TPUS if any(r["chip"] == chip for r in records)]
    heads = [*(f"{chip}, by its compiler" for chip in tpus), *(f"{card} cards, computed" for card in CARDS)]
    head = f"| Config | What it is | Parameters, MTP included | State | {' | '.join(heads)} |"
    rows = [head, "|---|---|---:|---:|" + "---|" * len(heads)]
    for name, what in CONFIGS.items():
        config = load(name)
        state = abstract(config)
        parameters = count(config, state).parameters
        by_compiler = [tpu_cell(config, CHIPS[chip], records) for chip in tpus]
        computed = [card_cell(config, state, CHIPS[card]) for card in CARDS.values()]
        sizes = _count(parameters), _bytes(12 * parameters)
        rows.append(f"| `{name}` | {what} | {' | '.join([*sizes, *by_compiler, *computed])} |")
    return "\n".join(rows)


def tpu_cell(config: Config, chip: Chip, records: list[dict[str, Any]]) -> str:
    """Return the smallest number of devices on which the step fits by its compiler, and what it was found with."""
    is_open = next(missing(config, chip, records), None) is not None
    fitting = [r for r in records if (r["config"], r["chip"]) == (config.name, chip.name) and r["does_fit"]]
    if not fitting:
        return NOT_ASKED if is_open else "none"
    best = min(fitting, key=lambda r: r["devices"])
    remat = "" if best["remat"] == config.execution.remat else f", remat {best['remat']}"
    memory = best["step_memory"]
    whole = f" ({WHOLE})" * (memory["source"] == "compiled")
    return f"{'at most ' * is_open}{best['devices']}{remat}: {memory['total'] / GIB:,.1f} GiB each{whole}"


def card_cell(config: Config, state: State, card: Chip) -> str:
    """Return the smallest number of cards that the code accepts and whose computed bytes leave room."""
    fits = candidates(config, state, card.room, most=1024)
    return str(fits[0].num_devices) if fits else "none"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:,.3f}B" if parameters >= 1e9 else f"{parameters / 1e6:,.1f}M"


def _bytes(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def read_records() -> list[dict[str, Any]]:
    """Return what compilers said so far."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def main(_) -> None:
    """Fill the record if asked to, then print the table."""
    records = read_records()
    if COMPILE.value:
        prepare()
        for record in compile_missing(records):
            write(RECORD, records)
            print({key: record[key] for key in ("config", "chip", "devices", "remat", "does_fit")}, file=sys.stderr)
    print(table(records))


if __name__ == "__main__":
    command.run(main)
