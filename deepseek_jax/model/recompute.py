"""What a layer keeps from its forward pass for the backward pass, and what it computes once more (DeepSeek-V3 section 3.2.3).

"selective" keeps the outputs of the large products: both latents of attention, its output, the residual stream in the middle of a layer,
the SwiGLU's pre-activations and the rows in the experts' order; and small things that took long: the router's logits, the choice of experts
and the order of their rows. Norms, the up-projections of attention, SwiGLU outputs and quantised copies are computed once more.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import Config

KEPT = ("query_latent", "kv_latent", "attention_out", "middle", "ffn_hidden", "routing", "expert_rows", "expert_hidden")


def keep(tree: Any, name: str) -> Any:
    """Return the same arrays, kept by "selective" recomputation under a name of `KEPT`.

    The barrier is for XLA on GPUs: where a kernel's result goes into the stack of all layers' kept arrays and also on to the next
    operation, XLA lets the kernel write into the stack, and runs it a second time for the other reader (24 of the 489 ms of a step).
    """
    return checkpoint_name(lax.optimization_barrier(tree), name)


def recomputed(config: Config, body: Callable, scanned: bool) -> Callable:
    """Return `body` with recomputation by config.

    Outside a scan, whose two passes are separate loops, XLA would merge the recomputation with the forward pass if it were let.
    """
    if config.execution.remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*KEPT) if config.execution.remat == "selective" else policies.nothing_saveable
    return jax.checkpoint(body, prevent_cse=not scanned, policy=policy)
