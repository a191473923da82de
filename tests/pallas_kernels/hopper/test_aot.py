"""Every kernel for Hopper is compiled to machine code on a machine that has no GPU, by XLA's CUDA plugin and NVIDIA's
assembler.

The interpreter checks what a kernel computes; this checks what the assembler makes of it. It has 65,536 registers a
multiprocessor to give, and a kernel that wants more is right and several times slower: it keeps values in memory, or
runs its products one after the other.
"""

import functools
import re

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.bench import workloads
from pallas_kernels.bench.operation import InPlace
from pallas_kernels.bench.shapes import FEW_TILES, Gradients
from tests.pallas_kernels.h100 import H100

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
pytest.importorskip("jax_cuda13_plugin", reason="the extra `dev` brings it on Linux")

EXPERTS = Gradients(64, 262144, 2048, 2048), Gradients(64, 262144, 1024, 2048)  # of `configs/v3_5b.py`, 32,768 tokens
OPERATIONS = {operation.name: operation for operation in workloads.operations(seed=1)}


@pytest.fixture(scope="module")
def h100():
    """Return an H100 to compile for."""
    return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]


def operands_on(device, operation, shape):
    """Return the shapes of a benchmark's operands, placed on `device`."""
    operands = jax.eval_shape(functools.partial(operation.operands, shape=shape), jax.random.key(0))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), operands
    )


def compile_for_cuda(jitted, *operands):
    return jitted.trace(*operands).lower(lowering_platforms=("cuda",)).compile()


@pytest.fixture
def assemble(h100, monkeypatch, capfd):
    """Return a function that compiles an operation and fails if the assembler spills or serialises."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def run(operation, shape):
        compile_for_cuda(jax.jit(operation.kernel(shape)), *operands_on(h100, operation, shape))
        report = "".join(capfd.readouterr())
        spills = [int(size) for size in re.findall(r"(\d+) bytes spill stores", report)]
        assert spills, report
        assert not any(spills), (shape, report)
        assert "are serialized" not in report, (shape, report)

    return run


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_assembler_has_registers_enough(name, assemble):
    for shape in list(OPERATIONS[name].rows)[:3]:
        assemble(OPERATIONS[name], shape)


@pytest.mark.parametrize("name", ["matmul_gradient", "matmul_accumulate"])
def test_so_it_has_for_parts_of_k(name, assemble):
    for shape in FEW_TILES:
        assemble(OPERATIONS[name], shape)


@pytest.mark.parametrize("name", ["grouped_matmul_gradient", "grouped_matmul_gradient_bf16"])
def test_so_it_has_for_many_experts(name, assemble):
    for shape in EXPERTS:
        assemble(OPERATIONS[name], shape)


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.accumulates])
def test_a_donated_accumulator_is_not_copied(name, h100):
    operation = OPERATIONS[name]
    shape = next(iter(operation.rows))
    *factors, total = operands_on(h100, operation, shape)
    assert " copy(" not in compile_for_cuda(InPlace(operation.kernel(shape)), total, *factors).as_text()
    assert " copy(" in compile_for_cuda(jax.jit(operation.kernel(shape)), *factors, total).as_text()


def test_parts_of_k_are_added_in_one_pass(h100):
    """By one fusion after the kernel, in the place of a donated accumulator."""
    operation, shape = OPERATIONS["matmul_accumulate"], next(iter(FEW_TILES))
    *factors, total = operands_on(h100, operation, shape)
    onto_c = compile_for_cuda(InPlace(operation.kernel(shape)), total, *factors).as_text()
    from_zero = compile_for_cuda(jax.jit(operation.kernel(shape)), *factors).as_text()
    for program in (onto_c, from_zero):
        assert program.count(" custom-call(") == program.count(" fusion(") == 1 and " copy(" not in program
