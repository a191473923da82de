"""What a layer keeps for its backward pass, and what it computes once more (DeepSeek-V3 section 3.2.3).

"selective" keeps the outputs of the large products: both latents of attention, its output, the residual stream in the
middle of a layer, the SwiGLU's pre-activations and the rows in the experts' order. It also keeps small results that
took long: the router's logits, the choice of experts and the order of their rows. Norms, the up-projections of
attention, SwiGLU outputs and quantised copies are computed once more.

Weights that a layer gathers are gathered once more, too, with `execution.gather` = "layer". With "kept" they are kept:
half the gathers, for the memory of all layers' weights, a byte a parameter in FP8 and two in BF16.

"full" keeps the residual stream before each layer. "offload" is "full" with these in the memory of the host. For each
token and layer 2 bytes a channel, 14 KB at V3's width, go out in the forward pass and come back in the backward pass.
The forward pass of a layer of V3 takes some 3 microseconds a token on an H800, so a device's link carries 5 GB/s of
the 53.5 GB/s that an H200's has; on one card, with 6 layers, two fifths of the copies were hidden (docs/memory.md).
What "selective" keeps, 180 to 240 KB, would need 60 to 80 GB/s: no policy sends that.

The choice of experts is kept even by "full", 4 bytes for each. A choice that is made twice can come out differently
where scores nearly tie: XLA may fuse the second computation in another way. Then gradients would go to experts that the
token never met.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import Execution
from deepseek_jax.parallel.host_memory import HOST_KIND
from deepseek_jax.parallel.weights import GATHERED

LAYER_INPUT = "layer_input"  # the residual stream before a layer
REPEATING = ("full", "offload")  # values of `execution.remat` that compute a whole layer once more
CHOICE = "choice"  # of experts, and the counts that the balance losses make of it
KEPT = (
    CHOICE,
    "query_latent",
    "kv_latent",
    "attention_out",
    "middle",
    "ffn_hidden",
    "routing",
    "expert_rows",
    "expert_hidden",
)


def keep(tree: Any, name: str) -> Any:
    """Return the same arrays, which "selective" recomputation keeps under a name of `KEPT`.

    The barrier is for XLA on GPUs. A kernel's result goes into the stack of all layers' kept arrays and also on to the
    next operation. Without the barrier XLA lets the kernel write into the stack and runs it a second time for the other
    reader (24 of the 489 ms of a step).

    FP8 is kept as bytes. JAX rounds kept floating-point numbers to their own precision (`reduce_precision`). Where XLA
    does not drop that rounding, it takes E4M3's largest numbers, 256 to 448, for infinity, which E4M3 does not have,
    and they become NaN (on CPUs).
    """
    return jax.tree.map(functools.partial(_keep_array, name=name), lax.optimization_barrier(tree))


def _keep_array(x: jax.Array, name: str) -> jax.Array:
    if x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating):
        return lax.bitcast_convert_type(checkpoint_name(lax.bitcast_convert_type(x, jnp.uint8), name), x.dtype)
    return checkpoint_name(x, name)


def layer_input(streams: Any) -> Any:
    """Return the residual streams before a layer under a name.

    What a checkpointed function is given is kept as it is. Only a value that it makes can be kept elsewhere.
    """
    return jax.tree.map(functools.partial(checkpoint_name, name=LAYER_INPUT), streams)


def recomputed(execution: Execution, body: Callable, scanned: bool) -> Callable:
    """Return `body` with the recomputation of `execution.remat`, and of gathers unless they are "kept".

    The two passes of a scan are separate loops. Outside a scan XLA would merge the recomputation with the forward pass,
    so there it is prevented.
    """
    if execution.remat == "none":
        return body
    kept = KEPT if execution.remat == "selective" else (CHOICE,)
    kept += (GATHERED,) if execution.gather == "kept" else ()
    if execution.remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(kept),
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst=HOST_KIND,
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(body, prevent_cse=not scanned, policy=policy)
