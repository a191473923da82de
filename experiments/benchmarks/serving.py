"""Measure a server under load: `python -m experiments.benchmarks.serving --url=http://127.0.0.1:8000 --rate=1,2,4`.

Any OpenAI-compatible server will do. For each rate, requests arrive at random (Poisson, --seed) for --seconds; their
prompts are random ids of --prompt_tokens, or the lines of a file:

    --prompts=FILE     JSON lines: {"prompt": "..."} or {"messages": [...]}, in random order

and each asks for --output_tokens. `load.py` says what is measured and how. Printed are the percentiles of the time to
first token and of the time between tokens, throughput, and goodput: requests a second that came whole, the first token
within 2 s and the others every 50 ms on average. --json writes records, --plot draws latency and goodput against load.

An API key is read from the environment variable OPENAI_API_KEY. Random ids are those from 100 to --vocab_size: the
first ones have special meanings in most vocabularies.
"""

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from deepseek_jax.inputs import new_file, shown
from experiments import command
from experiments.benchmarks import event_client, load, load_drawing, report
from experiments.benchmarks.load_prompts import parse_lengths, read_prompts
from pallas_kernels.bench.records import provenance, write

URL = flags.DEFINE_string("url", None, "Address of the server, such as http://127.0.0.1:8000.", required=True)
MODEL = flags.DEFINE_string("model", None, "Name of the model; by default the first that the server lists.")
RATE = flags.DEFINE_list("rate", ["1", "2", "4"], "Requests a second, one measurement for each number.")
SECONDS = flags.DEFINE_float("seconds", 60.0, "For how long requests arrive.", lower_bound=0.1, upper_bound=86400)
TIMEOUT = flags.DEFINE_float("timeout", 600.0, "Seconds that a request may take.", lower_bound=0.1, upper_bound=86400)
PROMPT_TOKENS = flags.DEFINE_string("prompt_tokens", "512", "Lengths: 512, uniform:64,1024 or lognormal:200,0.8.")
OUTPUT_TOKENS = flags.DEFINE_string("output_tokens", "128", "Lengths of the answers, written alike.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts, JSON lines, instead of random ids.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 256, "Random ids are less.", lower_bound=101, upper_bound=2**24)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of every request.", lower_bound=0.0, upper_bound=2.0)
EXTENSIONS = flags.DEFINE_bool(
    "extensions",
    True,
    "Ask for answers of the whole length and for counts in every chunk, as vLLM and this server know.",
)
WARMUP = flags.DEFINE_integer("warmup", 2, "Requests before the measurement.", lower_bound=0, upper_bound=1000)
SEED = flags.DEFINE_integer("seed", 0, "Of arrivals, lengths and prompts.", lower_bound=0)
DEVICE = flags.DEFINE_string("device", "not said", "What the server runs on, for the records.")
JSON = flags.DEFINE_string("json", None, "Write the records to this file.")
PLOT = flags.DEFINE_string("plot", None, "Draw latency and goodput against load into this PNG file.")

LOWEST_ID = 100  # of random ids


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured, whatever the rate: goes into every record."""

    model: str
    prompt: str
    output: str

    def record(self, rate: float, mode: str, value: float, unit: str) -> dict[str, Any]:
        """Return a record without its provenance."""
        shape = {"rate": rate, "prompt_tokens": self.prompt, "output_tokens": self.output, "seconds": SECONDS.value}
        found = {"config": self.model, "mode": mode, "precision": None, "shape": shape}
        return found | {"value": value, "unit": unit, "yardstick": None}


def main(_) -> None:
    """Parse, measure, report."""
    rates = [_rate(text) for text in RATE.value]
    outputs = [command.path_of(flag, new_file) for flag in (JSON, PLOT)]
    make_prompt = _prompts()
    server = event_client.parse_url(URL.value, os.environ.get("OPENAI_API_KEY"))
    model = MODEL.value or asyncio.run(_first_model(server))
    options: dict[str, Any] = {"temperature": TEMPERATURE.value, "stream_options": {"include_usage": True}}
    if EXTENSIONS.value:
        options |= {"ignore_eos": True, "return_token_ids": True}
        options["stream_options"]["continuous_usage_stats"] = True
    setting = Setting(model, "of a file" if PROMPTS.value else PROMPT_TOKENS.value, OUTPUT_TOKENS.value)
    measured = measure(event_client.target(server, model, options), rates, make_prompt, setting)
    common = provenance("experiments.benchmarks.serving", DEVICE.value)
    finish([record | common for record in measured], *outputs)


def finish(records: list[dict[str, Any]], json_file: Path | None, plot_file: Path | None) -> None:
    """Write and draw what is wanted."""
    if json_file:
        write(json_file, records)
    if plot_file:
        plot_file.parent.mkdir(parents=True, exist_ok=True)
        load_drawing.draw(records).savefig(plot_file, dpi=110)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 1e-3 <= rate <= 1e5:
        raise ValueError(f"--rate={shown(text)} must be numbers of requests a second, such as 1,2.5,10")
    return rate


async def _first_model(server: event_client.Server) -> str:
    try:
        return (await event_client.get_json(server, "/models"))["data"][0]["id"]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"--url={shown(URL.value)} lists no model; name one with --model") from error
    except (OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"--url={shown(URL.value)}: {shown(str(error))}; check the address and the server") from error


def _prompts() -> load.MakePrompt:
    """Return what draws prompts, by the flags.

    Raises:
        ValueError: they cannot be used.
    """
    outputs = parse_lengths(OUTPUT_TOKENS.value, "--output_tokens")
    if PROMPTS.value:
        lines = read_prompts(PROMPTS.value)
        return lambda rng: (lines[rng.integers(len(lines))], outputs.draw(rng))
    lengths = parse_lengths(PROMPT_TOKENS.value, "--prompt_tokens")
    return lambda rng: (rng.integers(LOWEST_ID, VOCAB_SIZE.value, lengths.draw(rng)).tolist(), outputs.draw(rng))


def measure(
    target: load.Target, rates: list[float], make_prompt: load.MakePrompt, setting: Setting
) -> list[dict[str, Any]]:
    """Return the records of all rates; each is printed when it is there.

    Raises:
        ValueError: the requests before the measurement failed.
    """
    loads = [
        load.plan(rate, SECONDS.value, make_prompt, np.random.default_rng((SEED.value, i)))
        for i, rate in enumerate(rates)
    ]
    records = []
    _warm_up(target, make_prompt)
    for rate, planned in zip(rates, loads, strict=True):
        samples = asyncio.run(load.run(target, planned, TIMEOUT.value))
        found = [setting.record(rate, mode, *value) for mode, value in load.summary(samples).items()]
        print(f"\n{setting.model}, {rate:g} requests/s")
        report.print_values(found)
        if errors := [sample.error for sample in samples if sample.error]:
            print(f"{len(errors)} of {len(samples)} requests failed; the first: {errors[0]}")
        records += found
    return records


def _warm_up(target: load.Target, make_prompt: load.MakePrompt) -> None:
    """Send requests one by one, and see that they are answered."""
    rng = np.random.default_rng((SEED.value, 2**32))
    for _ in range(WARMUP.value):
        asked = load.Asked(0.0, *make_prompt(rng))
        (sample,) = asyncio.run(load.run(target, [asked], TIMEOUT.value))
        if sample.error:
            raise ValueError(f"a request before the measurement failed: {sample.error}; check the flags and the server")


if __name__ == "__main__":
    command.run(main)
