"""What the network reads of a batch."""

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.router import Replay
from deepseek_jax.model.transformer import Inputs, shifted
from deepseek_jax.parallel import context
from deepseek_jax.training.objective import Batch, Detached, Objective


def network_inputs(model: Model, execution: Execution, objective: Objective, batch: Batch) -> Inputs:
    """Return this device's tokens of the whole rows of a batch."""
    segment_ids_BS = batch["segment_ids_BS"]
    next_BS = objective.next_tokens(batch)
    detached = isinstance(next_BS, Detached)
    next_BS = next_BS.tokens_BS if detached else next_BS
    following = () if next_BS is None else tuple(shifted(next_BS, depth) for depth in range(model.num_mtp_layers))
    return Inputs(
        context.local(batch["tokens_BS"]),
        context.local(batch["positions_BS"]),
        context.local(segment_ids_BS) > 0,
        # cuDNN runs only on rows of one segment, padded at the end: a causal mask is enough (`parallel.program`).
        None if execution.attention == "cudnn" else segment_ids_BS,
        tuple(map(context.local, following)),
        detached,
        Replay(context.local(batch["routes_BSLK"])) if "routes_BSLK" in batch else None,
    )
