"""A named kernel runs or is refused by name, and so is what is not an operand: in every package of operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, grouped, matmul, producers, quantize
from pallas_kernels.quantized import Quantized

X = jnp.ones((128, 256), jnp.bfloat16)
TILES = quantize.quantize_tiles(X, implementation="reference")
BLOCKS = quantize.quantize_blocks(X, implementation="reference")
EXPERTS = jax.tree.map(lambda a: a[None], BLOCKS)
SIZES = np.array([128], np.int32)
GAIN, WEIGHT = jnp.ones((256,), jnp.float32), jnp.ones((128,), jnp.float32)
PACKED = producers.e5m6_pack(X, implementation="reference")

# operation -> operands that fit
OPERATIONS = {
    matmul.matmul: (TILES, BLOCKS),
    matmul.matmul_accumulate: (TILES, TILES),
    grouped.grouped_matmul: (TILES, EXPERTS, SIZES),
    grouped.masked_matmul: (jax.tree.map(lambda a: a[None], TILES), EXPERTS, SIZES),
    grouped.grouped_matmul_accumulate: (TILES, TILES, SIZES),
    grouped.grouped_matmul_bf16: (X, X[None], SIZES),
    grouped.grouped_matmul_accumulate_bf16: (X, X, SIZES),
    quantize.quantize_tiles: (X,),
    quantize.quantize_blocks: (X,),
    quantize.quantize_tiles_both: (X,),
    quantize.requantize_transposed: (TILES,),
    quantize.quantize_rows: (X, np.arange(128, dtype=np.int32)),
    producers.rms_norm_quantize: (X, GAIN, 1e-6),
    producers.swiglu_quantize: (X, WEIGHT),
    producers.swiglu_backward_quantize: (X, X[:, :128], WEIGHT),
    producers.e5m6_pack: (X,),
    producers.e5m6_unpack: PACKED,
}
CASES = [pytest.param(operation, operands, id=operation.__name__) for operation, operands in OPERATIONS.items()]


def options(operation):
    return {"m": 128} if operation is producers.e5m6_unpack else {}


def test_every_operation_is_here():
    packages = (matmul, grouped, quantize, producers)
    public = {
        function
        for package in packages
        for name, function in vars(package).items()
        if callable(function) and "implementation" in getattr(function, "__annotations__", {})
    }
    assert {function for function in public if function.__name__ not in dir(dispatch)} == set(OPERATIONS)


@pytest.mark.parametrize(("operation", "operands"), CASES)
@pytest.mark.parametrize("implementation", ["hopper", "tpu"])
def test_a_kernel_that_cannot_run_here_is_refused(operation, operands, implementation):
    message = rf"{operation.__name__}: implementation = '{implementation}' cannot run on cpu; use 'auto' or 'reference'"
    with pytest.raises(NotImplementedError, match=message):
        operation(*operands, implementation=implementation, **options(operation))
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(lambda x: operation(x, *operands[1:], implementation=implementation, **options(operation)))(operands[0])


def test_a_kernel_is_refused_on_another_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_hardware", lambda: ("gpu", "8.0"))
    traced = jax.jit(lambda x: quantize.quantize_tiles(x, implementation="hopper")).trace(X)
    with pytest.raises(NotImplementedError, match=r"on a GPU of compute capability 8\.0, only on 9\.0; use 'auto'"):
        traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("operation", "operands"), CASES)
def test_what_is_not_an_operand_is_named(operation, operands):
    """A list in the place of each array, an array in the place of each Quantized, and the other way around."""
    for position, operand in enumerate(operands):
        wrong = [[1.0, 2.0], None, "x"]
        if isinstance(operand, Quantized):
            wrong += [X, Quantized([1.0], operand.scales, operand.grouping)]
        elif not isinstance(operand, float):
            wrong.append(TILES)
        for other in wrong:
            if isinstance(operand, float) or (other is None and operand is WEIGHT):  # may be None
                continue
            changed = (*operands[:position], other, *operands[position + 1 :])
            with pytest.raises(ValueError, match=" is of type | is an array |must be"):
                operation(*changed, implementation="reference", **options(operation))


def test_an_outlined_reference_is_one_call_and_the_same_numbers():
    """Its options are no operands, and a call of the same shapes is not traced again."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.float32)

    def twice(x):
        return [quantize.quantize_tiles(x, scale="pow2", implementation="reference") for _ in range(2)]

    with dispatch.outlined():
        program = jax.make_jaxpr(twice)(x)
        outlined = twice(x)
    calls = [equation.params["name"] for equation in program.eqns]
    assert calls == 2 * [f"{dispatch.OUTLINED}quantize_tiles"]
    assert program.eqns[0].params["jaxpr"] is program.eqns[1].params["jaxpr"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), outlined, twice(x)))
    assert len(jax.make_jaxpr(lambda x: twice(x))(x).eqns) > 2  # what was traced as a call stays one
