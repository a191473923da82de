"""The command `experiments.benchmarks.decoding`: its records, its floor, and how it counts kernels."""

import subprocess
import sys

import pytest

from experiments.benchmarks import breakdown
from tests.experiments.benchmarks import command

PROGRAM = """
%other.1 (p: f32[2]) -> f32[2] {
  ROOT %f = f32[2]{0} fusion(%p), kind=kLoop
}

%body.1 (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %a = f32[2]{0} fusion(%p), kind=kLoop, calls=%other.1
  %b = (f32[2]{0}, f32[2]{0}) custom-call(%a), custom_call_target="mosaic_gpu_v2"
  %c = f32[2]{0} bitcast(%a)
  %d = f32[2]{0} copy(%c)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %w = (s32[], f32[2]{0}) while(%t), condition=%condition.1, body=%body.1
}
"""


def test_kernels_are_those_of_the_longest_loop():
    assert breakdown.kernels_of_a_step(PROGRAM) == 3
    assert breakdown.kernels_of_a_step("") == 0


def test_kernels_of_a_run_are_those_outside_loops():
    assert breakdown.kernels_of_a_run(PROGRAM + "  %e = f32[2]{0} fusion(%w), kind=kLoop") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", ["0", "1.5"])
def test_numbers_of_sequences_are_checked(number):
    arguments = ["--config=configs/tiny.py", f"--batch=1,{number}"]
    refused = [sys.executable, "-m", "experiments.benchmarks.decoding", *arguments]
    done = subprocess.run(refused, cwd=command.ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and f"--batch={number} must be numbers" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["engine", "prefill"])
def test_records_of_a_small_model(mode, tmp_path):
    """The engine's records stand beside those of the bare loop."""
    arguments = ["--config=configs/tiny.py", "--config.model.num_layers=2", "--config.model.vocab_size=300"]
    arguments += [f"--mode={mode}", "--batch=1,3", "--context=20", "--repeats=2"]
    records, printed = command.run("experiments.benchmarks.decoding", arguments, tmp_path / "decoding.json")
    for batch in (1, 3):
        found = {record["mode"]: record["value"] for record in records if record["shape"]["batch"] == batch}
        tokens = batch * (20 if mode == "prefill" else 1)
        bare = found["prefill" if mode == "prefill" else "decode"]
        assert bare == pytest.approx(tokens / (found["time"] / 1e3))
        assert found["share of the floor"] == pytest.approx(100 * bare / found["floor"])
        if mode == "engine":
            assert found["share of the bare loop"] == pytest.approx(100 * found["engine"] / bare)
    assert all(record["shape"]["context"] == 20 and record["precision"] == "fp32" for record in records)
    assert "kernels of a layer" in printed
