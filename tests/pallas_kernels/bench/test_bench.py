"""The benchmark, as far as a machine without a GPU can show it: counts, records, and that it refuses to run."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import records, workloads
from pallas_kernels.bench.operation import LAUNCHES, Operation, Program, relative_error, work_of
from pallas_kernels.bench.shapes import (
    DENSE,
    XLA_DENSE,
    Dense,
    Linear,
    Masked,
    Rows,
)
from pallas_kernels.bench.yardsticks import COPY, XLA_BF16, XLA_FP8, yardsticks
from pallas_kernels.quantized import Quantized, dequantize

ROOT = Path(__file__).parents[3]
OPERATIONS = workloads.operations(seed=7)


def test_masked_counts_the_bytes_of_its_valid_rows():
    shape = Masked(3, 20, 200, 384, room=64)
    a, b, sizes = jax.eval_shape(
        functools.partial(_operation("masked_matmul").operands, shape=shape), jax.random.key(0)
    )
    row = a.values.shape[-1] + 4 * a.scales.shape[1] + 2 * shape.n  # bytes of one row: values, scales, output
    assert (
        sizes.shape == (3,)
        and shape.bytes == sum(x.size * x.dtype.itemsize for x in (b.values, b.scales)) + row * shape.sizes.sum()
    )


def test_masked_operands_have_the_scales_of_each_expert():
    shape, key = Masked(3, 2, 128, 256, room=8), jax.random.key(0)
    a, _, sizes = _operation("masked_matmul").make_operands(key, shape)
    x = jax.random.normal(jax.random.split(key)[0], (3, 8, 256), jnp.bfloat16)
    # half a step of E4M3, and of BF16
    np.testing.assert_allclose(dequantize(a), x, rtol=2**-4 + 2**-8, atol=2**-9 * a.scales.max())
    assert sizes.shape == (3,) and sizes.max() <= shape.room


def test_memory_bound_work_is_operands_and_results():
    operation, shape = _operation("quantize_tiles"), Rows(16, 256)
    operands = operation.make_operands(jax.random.key(0), shape)
    assert operation.program(shape, operands).work == 16 * 256 * 2 + 16 * 256 + 4 * 2 * 16


def _operation(name):
    return next(operation for operation in OPERATIONS if operation.name == name)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_row_is_a_valid_call(operation):
    for shape in operation.rows:
        operands = jax.eval_shape(functools.partial(operation.operands, shape=shape), jax.random.key(0))
        result = jax.eval_shape(
            functools.partial(operation.call, implementation="reference", **operation.exact), *operands
        )
        assert work_of(shape, operands, result) > 0
        if operation.accumulates:
            assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.tree.leaves(result)[-1]) == (
                operands[-1].shape,
                operands[-1].dtype,
            )


def test_operands_are_normal_and_different():
    a, b = _operation("matmul").make_operands(jax.random.key(0), Dense(128, 128, 256))
    assert (a.grouping, b.grouping) == ("tile", "block") and (a.values != b.values).mean() > 0.9
    assert abs(a.values.astype(jnp.float32)).max() == 448
    _, dy, w, _ = _operation("linear_with_weights").make_operands(jax.random.key(0), Linear(8, 128, 256))
    assert dy.shape == (8, 128) and w.shape == (128, 256)


def test_an_accumulating_operation_is_timed_in_place():
    call = lambda a, c, implementation: c + a  # noqa: E731
    operation = Operation("sum", call, {}, lambda key, shape: (), accumulates=True)
    program = operation.program(Dense(1, 1, 1), (jnp.float32(3), jnp.float32(1)))
    # the profiler would jit anything else, and undo the donation
    assert isinstance(program.function, jax.stages.Wrapped)
    results = [program.function(*program.operands) for _ in range(LAUNCHES + 1)]
    assert not any(result.is_deleted() for result in results) and not program.operands[1].is_deleted()
    again = program.function(*program.operands)
    assert results.pop(0).is_deleted()
    assert [float(result) for result in results] == [1 + 3] * LAUNCHES and again == 1 + 3 + 3


def test_error_is_relative_skips_what_is_unspecified_and_shows_nan():
    expected = Quantized(jnp.array([3.0, 4.0, jnp.nan]), jnp.array([2.0]), "tile")
    off_by_one = Quantized(jnp.array([3.0, 5.0, 7.0]), jnp.array([2.0]), "tile")
    assert relative_error(off_by_one, expected) == pytest.approx(1 / 5)
    assert relative_error(expected, expected) == 0
    assert np.isnan(relative_error(jnp.array([jnp.nan, 1.0]), jnp.array([0.0, 1.0])))


def test_yardsticks_do_the_same_work(monkeypatch):
    monkeypatch.setattr("pallas_kernels.bench.yardsticks.COPY_WORDS", 1024)
    assert list(yardsticks(Rows(4, 128), "fp8")) == [COPY]
    assert list(yardsticks(Linear(8, 128, 256), "fp8")) == [XLA_BF16]
    small = Dense(17, 48, 64)
    beside = yardsticks(small, "fp8")
    assert list(beside) == [XLA_FP8, XLA_BF16] and list(yardsticks(small, "bf16")) == [XLA_BF16]
    for program in beside.values():
        assert program.work == small.flops
        assert program.operands[0].shape == (32, 64) and program.operands[1].shape == (48, 64)
        result = program.function(*program.operands)
        exact = np.float64(program.operands[0]) @ np.float64(program.operands[1]).T
        assert result.dtype == jnp.bfloat16 and np.linalg.norm(result - exact) < 3e-3 * np.linalg.norm(exact)
        assert program is not beside[XLA_FP8] or all(abs(np.float32(x)).max() == 448 for x in program.operands)
    (linear,) = yardsticks(Linear(8, 128, 256), "fp8").values()
    assert [x.shape for x in linear.function(*linear.operands)] == [(8, 128), (8, 256), (128, 256)]


def test_times_are_medians_of_sums_in_turns(monkeypatch):
    turns = []

    def fake(function, *, aggregate, iterations):
        assert not aggregate

        def run(*operands):
            turns.append(function)
            slow = 9.0 if len(turns) == 1 else 0.0  # the first turn's first launch
            return None, [
                [("first", 1.0 * operands[0] + (slow if i == 0 else 0)), ("second", 0.5)] for i in range(iterations)
            ]

        return run

    monkeypatch.setattr(command.profiler, "measure", fake)
    programs = {"a": Program("a", (1.0,), 1), "b": Program("b", (1.5,), 1)}
    seconds, kernels = command.measure(programs)
    assert seconds == {"a": pytest.approx(1.5e-3), "b": pytest.approx(2e-3)} and kernels == {"a": 2, "b": 2}
    assert turns == ["a", "b"] * command.ROUNDS and command.ROUNDS * command.LAUNCHES >= 20


ROW = command.Row(
    "matmul", "fp8", XLA_DENSE, DENSE[XLA_DENSE], 175.0, 1, 1385.3, 1.7e-3, 4.2, {XLA_FP8: 1500.0, XLA_BF16: 800.0}
)
COPYING = command.Row("quantize_tiles", "fp8", Rows(16384, 7168), None, 83.0, 1, 4050.0, 0.0, 2.1, {COPY: 4200.0})


def test_rates_are_held_against_the_same_run():
    assert ROW.share == pytest.approx(0.70) and ROW.ratio == pytest.approx(0.92353, rel=1e-5)
    assert ROW.over_deepgemm == pytest.approx((1385.3 / 1500) / (1454 / 1545))
    assert COPYING.share == COPYING.ratio == pytest.approx(4050 / 4200) and COPYING.over_deepgemm is None
    assert dataclasses.replace(ROW, precision="bf16", rate=791.6).share == pytest.approx(0.8)


def test_records_say_all_and_can_be_written(tmp_path):
    common = records.provenance("pallas_kernels.bench", "1 x NVIDIA H200")
    found = [record | common for row in (ROW, COPYING) for record in command.describe(row)]
    keys = {
        "op",
        "mode",
        "precision",
        "shape",
        "value",
        "unit",
        "yardstick",
        "device",
        "jax",
        "date",
        "commit",
        "command",
    }
    assert all(set(record) == keys for record in found)
    records.write(tmp_path / "new" / "kernels.json", found)
    assert json.loads((tmp_path / "new" / "kernels.json").read_text()) == found
    rates = [record for record in found if record["mode"] == "rate"]
    assert [record["yardstick"]["value"] for record in rates] == [1500, 800, 4200] and {
        record["unit"] for record in rates
    } == {
        "TFLOP/s",
        "GB/s",
    }
    assert all(record["shape"] in ({"m": 4096, "n": 4096, "k": 7168}, {"m": 16384, "k": 7168}) for record in found)
    (deepgemm,) = (
        record for record in found if record["yardstick"] and record["yardstick"]["name"].startswith("DeepGEMM")
    )
    assert deepgemm["value"] / deepgemm["yardstick"]["value"] == pytest.approx(ROW.over_deepgemm)
    assert common["command"].startswith("python -m pallas_kernels.bench")


def _doubled(x, implementation):
    return 2 * x + (implementation == "hopper") * 0.02 * x


def _without_kernel(x, implementation):
    if implementation == "hopper":
        raise NotImplementedError("doubled has no 'hopper' kernel")
    return 2 * x


@pytest.mark.parametrize(
    "where", [["--json=/a/rows.json"], ["--json", "/a/rows.json"], ["--plot=/a/load.png"], ["--plot", "/a/b"]]
)
def test_a_record_does_not_say_where_it_was_written(monkeypatch, where):
    monkeypatch.setattr(sys, "argv", ["bench", "--op=matmul", *where, "--seed", "1"])
    assert records.provenance("a.b", "device")["command"] == "python -m a.b --op=matmul --seed 1"


def test_the_command_from_operands_to_records(monkeypatch, capsys, tmp_path):
    """With a profiler that runs the program and says one millisecond."""

    def fake(function, *, aggregate, iterations):
        return lambda *operands: (function(*operands), [[("kernel", 1.0)]] * iterations)

    def one_row(seed):
        rows = {Dense(8, 16, 32): DENSE[XLA_DENSE]}
        operands = lambda key, shape: (jax.random.normal(key, shape[:2]),)  # noqa: E731
        return [
            Operation(name, call, rows, operands) for name, call in (("doubled", _doubled), ("other", _without_kernel))
        ]

    monkeypatch.setattr(command.profiler, "measure", fake)
    monkeypatch.setattr(command, "operations", one_row)
    monkeypatch.setattr(command, "take_gpu", lambda: jax.devices()[0])
    for arguments, shown in (
        ([], ("doubled\n", "other\n", "has no 'hopper' kernel")),
        (["--op=doubled"], ("doubled\n",)),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", f"--json={tmp_path}/rows.json", *arguments])
        command.main()
        printed = capsys.readouterr().out
        assert all(text in printed for text in shown) and ("other" in printed) == ("other\n" in shown)
        values = {record["mode"]: record["value"] for record in json.loads((tmp_path / "rows.json").read_text())}
        assert values["rate"] == pytest.approx(2 * 8 * 16 * 32 / 1e-3 / 1e12) and values["median"] == pytest.approx(
            1000
        )
        assert values["relative L2 error"] == pytest.approx(0.01, rel=1e-4) and values[
            "ratio to the yardstick"
        ] == pytest.approx(1)
        assert 0 < values["first call"] < 60


def test_refuses_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.bench", "--op=matmul", f"--json={tmp_path}/none.json"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "none.json").exists()
    (line,) = done.stderr.splitlines()
    assert "needs an NVIDIA GPU" in line
