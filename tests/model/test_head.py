"""Cross entropy and log-probabilities per token against plain JAX in value and gradient, and their memory."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.head import cross_entropy, token_logprobs
from deepseek_jax.posttraining.policy_objective import policy_logprobs

T, D, V = 50, 16, 72


def make_inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_TD = jax.random.normal(keys[0], (T, D)).astype(dtype)
    head_DV = jax.random.normal(keys[1], (D, V))
    targets_T = jax.random.randint(keys[2], (T,), 0, V)
    weights_T = jax.random.bernoulli(keys[3], 0.7, (T,)).astype(jnp.float32) * jnp.linspace(0.5, 2.0, T)
    return hidden_TD, head_DV, targets_T, weights_T


def plain(hidden_TD, head_DV, targets_T, weights_T, z_weight):
    logits_TV = hidden_TD.astype(jnp.float32) @ head_DV
    z_T = jax.nn.logsumexp(logits_TV, axis=-1)
    loss_T = z_T - jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return (weights_T * loss_T).sum(), z_weight * (weights_T * z_T**2).sum()


def gradients(function, *arguments):
    """Value and gradients of 0.37 times the objective: a cotangent other than one."""

    def objective(hidden_TD, head_DV):
        return 0.37 * sum(function(hidden_TD, head_DV, *arguments[2:]))

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))(*arguments[:2])


@pytest.mark.parametrize("chunk", [1, 10, 16, 64])  # of 50 tokens: two divide, one does not, one exceeds
def test_equals_plain_value_and_gradient(chunk):
    inputs, z_weight = make_inputs(), 1e-2
    sums = jax.jit(cross_entropy, static_argnums=(4, 5))(*inputs, chunk, z_weight)
    for got, want in zip(sums, plain(*inputs, z_weight), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6)
    value, grads = gradients(functools.partial(cross_entropy, chunk=chunk, z_weight=z_weight), *inputs)
    want_value, want_grads = gradients(functools.partial(plain, z_weight=z_weight), *inputs)
    np.testing.assert_allclose(value, want_value, rtol=2e-6)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_large_logits_stay_finite():
    inputs = make_inputs()
    value, grads = gradients(functools.partial(cross_entropy, chunk=16, z_weight=0.0), 1e4 * inputs[0], *inputs[1:])
    assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads)


def test_bf16_accumulates_the_head_gradient_in_fp32():
    """16,384 equal tokens in chunks of 16 add 2 each to a sum of 2048: in BF16 that stops growing at 512."""
    num_tokens = 16384
    hidden_TD, head_DV = jnp.ones((num_tokens, 4), jnp.bfloat16), jnp.zeros((4, 8))
    ones, zeros = jnp.ones(num_tokens), jnp.zeros(num_tokens, jnp.int32)
    _, (hidden_grad_TD, head_grad_DV) = gradients(
        functools.partial(cross_entropy, chunk=16, z_weight=0.0), hidden_TD, head_DV, zeros, ones
    )
    assert hidden_grad_TD.dtype == jnp.bfloat16 and head_grad_DV.dtype == jnp.float32
    np.testing.assert_allclose(head_grad_DV[:, 1:], 0.37 * num_tokens / 8, rtol=1e-6)


def test_bf16_is_close_to_fp32():
    inputs = make_inputs(jnp.bfloat16)
    value, grads = gradients(functools.partial(cross_entropy, chunk=16, z_weight=0.0), *inputs)
    want_value, want_grads = gradients(functools.partial(plain, z_weight=0.0), *inputs)
    np.testing.assert_allclose(value, want_value, rtol=4e-3)  # the head is rounded to BF16: 2^-9 a factor
    for got, want in zip(grads, want_grads, strict=True):
        assert np.linalg.norm(np.float32(got - want)) < 1e-2 * np.linalg.norm(np.float32(want))


def objective(hidden_TD, head_DV, targets_T, weights_T, chunk=16, z_weight=1e-2):
    return sum(cross_entropy(hidden_TD, head_DV, targets_T, weights_T, chunk, z_weight))


def all_shapes(jaxpr):
    """Yield the shape of every intermediate, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from all_shapes(inner)


@pytest.mark.parametrize("differentiate", [False, True])
def test_logits_of_the_whole_batch_never_exist(differentiate):
    num_tokens, width, vocabulary, chunk = 4096, 8, 1024, 128
    shapes = (num_tokens, width), (width, vocabulary), (num_tokens,), (num_tokens,)
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    function = functools.partial(objective, chunk=chunk)
    function = jax.value_and_grad(function, argnums=(0, 1)) if differentiate else function
    sizes = [np.prod(shape) for shape in all_shapes(jax.make_jaxpr(function)(*arguments).jaxpr)]
    assert max(sizes) == chunk * vocabulary
    temporary = jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporary < num_tokens * vocabulary * 4 / 4, "a quarter of the FP32 logits of the batch"


def count_matmuls(function):
    return str(jax.make_jaxpr(function)(*make_inputs())).count("dot_general")


def test_forward_alone_makes_no_gradient_and_gradient_repeats_no_matmul():
    assert count_matmuls(objective) == 1
    assert count_matmuls(jax.grad(objective, argnums=(0, 1))) == 3


@pytest.mark.parametrize("head_sharded", [False, True], ids=["replicated head", "gathered head"])
def test_inside_shard_map_equals_one_device(head_sharded):
    """Tokens over eight devices; a cast of the replicated head to varying sums its gradients in its transpose."""
    mesh = jax.make_mesh((8,), ("data",))
    hidden_TD, head_DV, targets_T, weights_T = (x[:48] if x.shape[0] == T else x for x in make_inputs())
    rows, head_spec = jax.P("data"), jax.P("data") if head_sharded else jax.P()

    def local(hidden, head, targets, weights):
        head = jax.lax.all_gather(head, "data", axis=0, tiled=True) if head_sharded else head
        return jax.lax.psum(objective(hidden, head, targets, weights, chunk=4), "data")

    with jax.set_mesh(mesh):
        specs = rows, head_spec, rows, rows
        inputs = [
            jax.device_put(x, spec) for x, spec in zip((hidden_TD, head_DV, targets_T, weights_T), specs, strict=True)
        ]
        island = jax.shard_map(local, in_specs=specs, out_specs=jax.P())
        value, grads = jax.jit(jax.value_and_grad(island, argnums=(0, 1)))(*inputs)
    want_value, want_grads = jax.value_and_grad(objective, argnums=(0, 1))(hidden_TD, head_DV, targets_T, weights_T)
    np.testing.assert_allclose(value, want_value, rtol=2e-6)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match="loss_chunk = 0"):
        cross_entropy(*make_inputs(), 0, 0.0)
    with pytest.raises(ValueError, match="loss_chunk = 0"):
        token_logprobs(*make_inputs()[:3], 0)


def plain_logprobs(hidden_TD, head_DV, targets_T):
    logits_TV = hidden_TD.astype(jnp.float32) @ head_DV
    logprobs_TV = jax.nn.log_softmax(logits_TV, axis=-1)
    return jnp.take_along_axis(logprobs_TV, targets_T[:, None], axis=-1)[:, 0], jax.nn.logsumexp(logits_TV, axis=-1)


def pulled_back(function, hidden_TD, head_DV, targets_T):
    """Values, and gradients for a cotangent of either sign at every token."""
    values, pull = jax.vjp(lambda hidden, head: function(hidden, head, targets_T), hidden_TD, head_DV)
    return values, pull(tuple(jax.random.normal(jax.random.key(i), (T,)) for i in (7, 8)))


@pytest.mark.parametrize("chunk", [1, 10, 16, 64])
def test_logprobs_and_gradients_are_those_of_log_softmax(chunk):
    inputs = make_inputs()[:3]
    got = jax.jit(functools.partial(pulled_back, functools.partial(token_logprobs, chunk=chunk)))(*inputs)
    want = jax.jit(functools.partial(pulled_back, plain_logprobs))(*inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_logprobs_among_kept_ids_are_those_of_a_softmax_over_them():
    """A token without a bit has all ids; the words of a sampler that knows fewer ids than the head are shorter."""
    hidden_TD, head_DV, targets_T, _ = make_inputs()
    kept_TV = np.random.default_rng(0).random((T, V)) < 0.2
    kept_TV[:, 64:], targets_T = False, targets_T % 64
    kept_TV[9, :32], targets_T = False, targets_T.at[9].set(40)  # a word of zeros beside one that is not
    kept_TV[np.arange(T), targets_T] = True
    words_TW = np.packbits(kept_TV[:, :64], axis=1, bitorder="little").view(np.int32)
    kept_TV[7], words_TW[7] = True, 0

    def plain_kept(hidden_TD, head_DV, targets_T):
        logits_TV = jnp.where(kept_TV, hidden_TD @ head_DV, -jnp.inf)
        log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
        return jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0] - log_z_T, log_z_T

    ours = functools.partial(token_logprobs, chunk=16, kept_TW=jnp.asarray(words_TW))
    got, want = (jax.jit(functools.partial(pulled_back, f))(hidden_TD, head_DV, targets_T) for f in (ours, plain_kept))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_bf16_at_a_temperature_are_those_of_fp32_logits_over_it(temperature):
    """As the sampler's are: a head over the temperature would be rounded to BF16 once more."""
    hidden_TD, head_DV, targets_T, _ = make_inputs(jnp.bfloat16)

    def sampled(hidden_TD, head_DV, targets_T):
        logits_TV = jnp.matmul(hidden_TD, head_DV.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        chosen_T = jnp.take_along_axis(logits_TV / temperature, targets_T[:, None], axis=-1)[:, 0]
        log_z_T = jax.nn.logsumexp(logits_TV / temperature, axis=-1)
        return chosen_T - log_z_T, log_z_T

    ours = functools.partial(token_logprobs, chunk=16, temperature=temperature)
    (got, grads), (want, want_grads) = (pulled_back(f, hidden_TD, head_DV, targets_T) for f in (ours, sampled))
    assert [x.dtype for x in (*got, *grads)] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    policy = policy_logprobs(hidden_TD[None], head_DV, targets_T[None], None, 16, temperature)
    for a, b in zip((*got, policy[0]), (*want, want[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    for a, b in zip(grads, want_grads, strict=True):  # the cotangents of the logits are rounded to BF16
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=2e-2 * np.abs(np.float32(b)).max())


def test_no_array_of_tokens_times_vocabulary_in_either_direction():
    num_tokens, vocabulary, chunk = 512, 1024, 64

    def loss(hidden_TD, head_DV, targets_T):
        return token_logprobs(hidden_TD, head_DV, targets_T, chunk)[0].sum()

    shapes = (num_tokens, D), (D, vocabulary), (num_tokens,)
    dtypes = jnp.float32, jnp.float32, jnp.int32
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(*arguments).jaxpr
    assert max(np.prod(shape) for shape in all_shapes(jaxpr)) == chunk * vocabulary


def test_logprobs_inside_shard_map_equal_one_device():
    """Tokens over eight devices, a cotangent per token, a head that is everywhere."""
    mesh = jax.make_mesh((8,), ("data",))
    hidden_TD, head_DV, targets_T, weights_T = (x[:48] if x.shape[0] == T else x for x in make_inputs())

    def one_device(hidden_TD, head_DV, targets_T, weights_T):
        return (token_logprobs(hidden_TD, head_DV, targets_T, 4)[0] * weights_T).sum()

    rows = jax.P("data")
    with jax.set_mesh(mesh):
        specs = rows, jax.P(), rows, rows
        arrays = (hidden_TD, head_DV, targets_T, weights_T)
        placed = [jax.device_put(x, spec) for x, spec in zip(arrays, specs, strict=True)]
        island = jax.shard_map(lambda *x: jax.lax.psum(one_device(*x), "data"), in_specs=specs, out_specs=jax.P())
        value, grads = jax.jit(jax.value_and_grad(island, argnums=(0, 1)))(*placed)
    want_value, want_grads = jax.value_and_grad(one_device, argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(value, want_value, rtol=2e-6)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
