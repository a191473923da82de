"""Rows of tokens in the order of slots, and back: two gathers that are each other's transpose.

`source` says which assignment fills a slot, `slots` where an assignment went. So both directions read by index and
neither writes by index, and the derivative of reading by one is reading by the other. Five tokens, one expert each, six
slots:

    source_W    1 0 3 5 2 4        slot 3 is empty: 5 = T * K
    slots_TK    1 0 4 2 5          token 0 lies in slot 1
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, source_W: jax.Array, slots_TK: jax.Array) -> jax.Array:
    """Return rows in slot order: slot w holds token `source_W[w] // K`, or zeros where `source_W[w]` = T * K."""
    return _take(x_TD, source_W // slots_TK.shape[1])


@jax.custom_vjp
def sum_rows(y_WD: jax.Array, source_W: jax.Array, slots_TK: jax.Array) -> jax.Array:
    """Sum the rows of each token's assignments in FP32: the transpose of `gather_rows`. Slot index W adds zero."""
    # K gathers fuse with their sum.
    parts = (_take(y_WD, slots_TK[:, k]).astype(jnp.float32) for k in range(slots_TK.shape[1]))
    return sum(parts).astype(y_WD.dtype)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


gather_rows.defvjp(
    lambda x, source, slots: (gather_rows(x, source, slots), (source, slots)),
    lambda index, g: (sum_rows(g, *index), None, None),
)
sum_rows.defvjp(
    lambda y, source, slots: (sum_rows(y, source, slots), (source, slots)),
    lambda index, g: (gather_rows(g, *index), None, None),
)
