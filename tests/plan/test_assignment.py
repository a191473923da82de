"""The memory of a step from the dump of a compiler that is ended before it makes code."""

import dataclasses
import json
import subprocess
import sys

import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.plan import assignment
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.memory import StepMemory
from tests.support import small

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
"""
TOTAL, ARGUMENTS, TEMPORARIES = 8443968, 4194304, 4243488


def test_an_assignment_counts_each_piece_of_the_main_memory_once():
    assert assignment.read_assignment(DUMP) == StepMemory(TOTAL, ARGUMENTS, TEMPORARIES)


@pytest.fixture
def compiler(monkeypatch):
    """A process in the compiler's place: it runs a script, whose `folder` is the one that is watched."""
    begun = []

    def begin(script):
        def start(request, folder):
            text = f"import json, pathlib, sys, time; folder = pathlib.Path({str(folder)!r})\n{script}"
            json.dumps(request)
            begun.append(subprocess.Popen([sys.executable, "-c", text], start_new_session=True))
            return begun[-1]

        monkeypatch.setattr(assignment, "_begin", start)
        monkeypatch.setattr(assignment, "SECONDS_BETWEEN_LOOKS", 0.02)
        return begun

    return begin


def step_memory(memory=CHIPS["v5p"].memory):
    config = from_config_dict(small.config_dict())
    return assignment.assign_step(config, dataclasses.replace(CHIPS["v5p"], memory=memory), 8)


def test_the_compiler_is_ended_when_it_has_assigned_the_buffers(compiler):
    """The report is written last: before it, the assignment may be a part."""
    begun = compiler(
        f"(folder / 'm.after-buffer-assignment.txt').write_text({DUMP!r})\n"
        "(folder / 'm.after-memory-usage-report.txt').write_text('')\ntime.sleep(600)"
    )
    found = step_memory()
    assert (found.total, found.arguments, found.temporaries, found.fits) == (TOTAL, ARGUMENTS, TEMPORARIES, True)
    assert begun[0].poll() is not None


def test_a_refusal_is_the_compilers_own(compiler):
    """It comes after the assignment."""
    refusal = dataclasses.asdict(StepMemory(2 * TOTAL, None, None, capacity=TOTAL - 1))
    compiler(
        f"(folder / 'm.after-buffer-assignment.txt').write_text({DUMP!r})\n"
        "(folder / 'm.after-memory-usage-report.txt').write_text('')\ntime.sleep(0.2)\n"
        f"(folder / 'result').write_text(json.dumps({refusal!r}))"
    )
    found = step_memory(TOTAL - 1)
    assert (found.total, found.capacity, found.fits) == (2 * TOTAL, TOTAL - 1, False)


def test_a_compiler_that_fails_says_why(compiler):
    compiler("(folder / 'said').write_text('INTERNAL: no such thing')\nsys.exit(1)")
    with pytest.raises(ValueError, match="the compiler of v5p does not take the step of small: INTERNAL: no such"):
        step_memory()
