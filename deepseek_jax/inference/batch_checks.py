"""What a `DeviceBatch` refuses before it is made, and before a job is taken."""

from collections.abc import Sequence

import jax

from deepseek_jax.inference.job import Job
from deepseek_jax.inference.memory import free_bytes
from deepseek_jax.inference.prefill import FEWEST_TOKENS
from deepseek_jax.inference.requests import Request, check_bias
from deepseek_jax.inference.row_state import MOST_BIASES
from deepseek_jax.inference.step import Piece
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import ROWS
from pallas_kernels.mla_decode.schedule import PAGE


def check_job(job: Job, vocab_size: int, is_exact: bool) -> None:
    """Refuse what no row can do."""
    check_own(job.own, vocab_size)
    if is_exact and job.kept:
        raise ValueError(
            "kept = True has log-probabilities among the kept ids, and exact arithmetic those among all: leave it out,"
            " or open the engine with exact=False"
        )


def check_own(own: Request, vocab_size: int) -> None:
    """Refuse a bias of an id that no token has, and more of them than a row can have."""
    check_bias(own, vocab_size)
    if len(own.logit_bias) > MOST_BIASES:
        raise ValueError(f"logit_bias has {len(own.logit_bias)} ids; give at most {MOST_BIASES}")


def check_sizes(num_rows: int, num_pages: int, num_positions: int, most_prefill_tokens: int) -> None:
    """Refuse sizes that no batch can have."""
    for name, value in (("num_rows", num_rows), ("num_pages", num_pages), ("num_positions", num_positions)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if most_prefill_tokens < FEWEST_TOKENS or most_prefill_tokens & (most_prefill_tokens - 1):
        raise ValueError(
            f"most_prefill_tokens = {most_prefill_tokens} must be a power of two, and at least {FEWEST_TOKENS}"
        )


def check_burst(burst: int | None) -> None:
    """Refuse bursts without a token."""
    if burst is not None and burst < 1:
        raise ValueError(f"burst = {burst} must be at least 1; leave it out for the default")


def check_burst_step(num_tokens: int, burst: int, behind: Sequence[int], masked: Sequence[int]) -> None:
    """Refuse a burst that there is no program for, for rows `behind` the first, and for rows that wait for the host."""
    if num_tokens != burst or len(behind):
        raise ValueError(
            f"a step of {num_tokens} tokens: bursts here have {burst}, and rows {list(behind)} can have none; ask for 1"
        )
    if masked:
        raise ValueError(f"rows {list(masked)} are masked, and need set_mask before each token; ask for 1")


def check_pieces(pieces: Sequence[Piece], devices: Sequence[int], most_tokens: int) -> None:
    """Refuse pieces without a token, and more tokens of a device than a step takes; `devices` are those of the rows."""
    for piece in pieces:
        if not len(piece.ids):
            raise ValueError(f"the piece of row {piece.row} has no token; give at least one")
    for device in set(devices):
        num_tokens = sum(len(piece.ids) for piece, own in zip(pieces, devices, strict=True) if own == device)
        if num_tokens > most_tokens:
            raise ValueError(f"{num_tokens} tokens of prefill; a step takes {most_tokens} of a device")


def check_pages(bytes_per_token: int, num_pages: int, mesh: jax.sharding.Mesh) -> None:
    """Refuse pages that the devices of `mesh` cannot hold."""
    num_bytes = bytes_per_token * PAGE * num_pages
    if mesh.local_devices[0].platform == "cpu":  # its devices share the memory
        num_bytes *= axis_size(mesh, ROWS)
    free = free_bytes(mesh)
    if num_bytes > free:
        fitting = int(num_pages * free / num_bytes)
        raise ValueError(
            f"a cache of {num_pages:,} pages takes {num_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free;"
            f" {fitting:,} pages would fit, {fitting * PAGE:,} tokens"
        )
