"""The memory of a step from the dump of a compiler that is ended before it makes code."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel import program
from deepseek_jax.plan import assignment
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.memory import StepMemory
from tests.support import compiling, small

# Of jit(lambda x: scan(tanh(c c) + 1)) with x donated, FP32 [1024, 1024], for v5p; libtpu 0.0.48.1, shortened. Its
# memory report says 8,443,968 bytes in all, and `memory_analysis` of the whole compilation 4,194,304 of arguments,
# 4,324,288 of temporaries and 647,168 of code.
DUMP = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <9 reduce_sum.2 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4194304, page 0, parameter 0, shape |f32[1024,1024]| at ShapeIndex {}, maybe-live-out:
 value: <27 fusion.9{1} @0> (size=4194304,offset=0): f32[1024,1024]{1,0:T(8,128)}
allocation 2: size 5632, page 0, constant:
allocation 10: size 32, page 0, output shape is |(f32[1024,1024], f32[7])|, maybe-live-out:
allocation 14: size 512, color 6, page 0, preallocated-temp:
 value: <21 copy.5 @6> (size=512,offset=0): s32[]{:T(128)S(6)}
allocation 15: size 4243488, page 0, preallocated-temp:
allocation 16: size 1048576, color 5, page 0, preallocated-temp:
"""
TOTAL, ARGUMENTS, TEMPORARIES = 8443968, 4194304, 4243488
ON_HOST = 1048576  # of another program, which has what two layers keep in host memory
ASSIGNED = StepMemory(TOTAL, ARGUMENTS, TEMPORARIES, source="assigned", on_host=ON_HOST)
NAME = "module_0000.jit_run.cl_1000038190.after_optimizations"  # libtpu's, for the step
WRITE = f"""
(folder / '{NAME}-buffer-assignment.txt').write_text({DUMP!r})
(folder / '{NAME}.txt').write_text('HloModule')
"""


def read(folder, text):
    path = folder / "m.after_optimizations-buffer-assignment.txt"
    path.write_text(text)
    return assignment.read_assignment(path)


def test_an_assignment_counts_each_piece_of_the_main_memory_once(tmp_path):
    assert read(tmp_path, DUMP) == ASSIGNED


def test_an_assignment_of_another_form_is_not_a_step_without_memory(tmp_path):
    name = r"m\.after_optimizations-buffer-assignment\.txt"
    with pytest.raises(ValueError, match=f"{name} has no line .*use --nocompile"):
        read(tmp_path, DUMP.replace("allocation", "buffer"))
    with pytest.raises(ValueError, match=f"{name} has 'allocation 15: size=4243488.*--nocompile"):
        read(tmp_path, DUMP.replace("15: size ", "15: size="))


@pytest.fixture
def compiler(monkeypatch):
    """A process in the compiler's place: it runs a script, whose `folder` is the one that is watched."""
    begun = []

    def begin(script, seconds_to_refuse=600.0):
        def start(request, folder):
            text = f"import json, pathlib, sys, time; folder = pathlib.Path({str(folder)!r})\n{script}"
            json.dumps(request)
            begun.append(subprocess.Popen([sys.executable, "-c", text], start_new_session=True))
            return begun[-1]

        monkeypatch.setattr(assignment, "_begin", start)
        monkeypatch.setattr(assignment, "SECONDS_BETWEEN_LOOKS", 0.02)
        monkeypatch.setattr(assignment, "SECONDS_TO_REFUSE", seconds_to_refuse)
        return begun

    return begin


def step_memory(memory=CHIPS["v5p"].memory):
    config = from_config_dict(small.config_dict())
    return assignment.assign_step(config, dataclasses.replace(CHIPS["v5p"], memory=memory), 8)


def test_the_compiler_is_ended_when_it_has_assigned_the_buffers(compiler):
    """All files are opened at once, the program's is written last: before it, the assignment may be empty or a part."""
    begun = compiler(
        f"(folder / '{NAME}-memory-usage-report.txt').write_text('Memory Space')\n"
        f"[(folder / f'{NAME}{{rest}}.txt').write_text('') for rest in ('-buffer-assignment', '')]\n"
        f"time.sleep(0.1)\n(folder / '{NAME}-buffer-assignment.txt').write_text({DUMP[: len(DUMP) // 2]!r})\n"
        f"time.sleep(0.1)\n{WRITE}\ntime.sleep(600)"
    )
    found = step_memory()
    assert dataclasses.replace(found, seconds=None) == ASSIGNED and found.fits
    assert begun[0].poll() == -signal.SIGKILL


def test_a_small_program_that_is_compiled_first_is_not_the_step(compiler):
    small_dump = "allocation 0: size 512, page 0, parameter 0, shape |f32[128]| at ShapeIndex {}:\n"
    first = WRITE.replace("jit_run", "jit_convert").replace(repr(DUMP), repr(small_dump))
    compiler(f"{first}\ntime.sleep(0.2)\n{WRITE}\ntime.sleep(600)")
    assert dataclasses.replace(step_memory(), seconds=None) == ASSIGNED


def test_the_step_has_the_name_that_is_looked_for(monkeypatch):
    monkeypatch.setattr(program.jax, "jit", lambda run, **settings: run)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
    run = program.jit_on.__wrapped__(print, small.config().execution, mesh)
    assert f"jit_{run.__name__}" == assignment.STEP


def test_a_refusal_is_the_compilers_own(compiler):
    """It comes after the assignment."""
    refusal = dataclasses.asdict(StepMemory(2 * TOTAL, None, None, capacity=TOTAL - 1))
    compiler(f"{WRITE}\ntime.sleep(0.2)\n(folder / 'result').write_text(json.dumps({refusal!r}))")
    found = step_memory(TOTAL - 1)
    assert (found.total, found.capacity, found.fits, found.source) == (2 * TOTAL, TOTAL - 1, False, "compiled")


def test_a_step_that_is_larger_than_the_chip_and_not_refused_yet_does_not_fit(compiler):
    begun = compiler(f"{WRITE}\ntime.sleep(600)", 0.1)
    found = step_memory(TOTAL - 1)
    assert (found.total, found.capacity, found.fits, found.source) == (TOTAL, TOTAL - 1, False, "assigned")
    assert begun[0].poll() == -signal.SIGKILL


@pytest.mark.parametrize("memory", [CHIPS["v5p"].memory, TOTAL - 1])
def test_a_compiler_that_is_faster_than_a_look_has_the_same_total(compiler, memory):
    """It took the step, so it fits, even if the pieces are larger than what the chip is said to have."""
    own = dataclasses.asdict(StepMemory(TOTAL + 647168, ARGUMENTS, TEMPORARIES, peak=TOTAL))
    compiler(f"{WRITE}\n(folder / 'result').write_text(json.dumps({own!r}))")
    found = step_memory(memory)
    assert dataclasses.replace(found, seconds=None) == ASSIGNED and found.fits


@pytest.mark.parametrize(
    ("end", "how"),
    [("sys.exit(3)", "ended with code 3"), ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL")],
)
def test_a_process_that_fails_says_how_and_why(compiler, end, how):
    compiler(f"(folder / 'said').write_text('INTERNAL: no such thing')\n{end}")
    with pytest.raises(ValueError, match=f"compiles the step of small for v5p {how}.*: INTERNAL: no such"):
        step_memory()


def test_a_closed_stream_ends_the_process_that_reads_it():
    codes, (read_end, write_end) = [], os.pipe()
    with os.fdopen(read_end) as stream:
        thread = assignment.end_with(stream, codes.append)
        thread.join(0.05)
        assert thread.is_alive() and not codes
        os.close(write_end)
        thread.join(120)
    assert codes == [1]


@pytest.fixture
def libtpu(monkeypatch):
    """The process that compiles has this one's XLA_FLAGS, and those of the tests are for a CPU."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: the `dev` extra has it on Linux x86-64")
    monkeypatch.setenv("XLA_FLAGS", compiling.ACCELERATOR_FLAGS)


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
def test_the_real_compiler_assigns_a_step_whose_layers_keep_their_inputs_on_the_host(libtpu):
    tree = small.config_dict()
    tree.model.update({"num_layers": 2, "num_dense_layers": 2, "num_mtp_layers": 0})
    tree.execution.remat = "offload"
    tree.optimizer.update({"ema_decay": 0.999, "ema_memory": "host"})  # by a program of its own, which is not in it
    tree.training.micro_batch_size = 16
    found = assignment.assign_step(from_config_dict(tree), CHIPS["v5p"], 1)
    assert found.source == "assigned" and found.fits
    assert 0 < found.arguments < found.total and 0 < found.temporaries < found.total
    lanes = 128  # a TPU stores 64 channels as 128
    assert found.on_host == 2 * 16 * 64 * lanes * 4


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
def test_the_real_process_ends_with_the_one_that_began_it(libtpu, tmp_path):
    request = {"config": small.config_dict().to_dict(), "chip": "v5p", "devices": 8, "folder": str(tmp_path)}
    process = assignment._begin(request, tmp_path)
    try:
        process.stdin.close()
        assert process.wait(600) == 1
    finally:
        process.kill()
    assert "Traceback" not in (tmp_path / "said").read_text()
