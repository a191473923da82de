"""A `DeviceBatch` for an engine: its pages from the memory that is free, its programs compiled with progress."""

from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.batch_checks import check_pages, check_sizes
from deepseek_jax.inference.cache import cache_bytes_per_token
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.decode import num_rows as rows_of_batch
from deepseek_jax.inference.drafting import check_drafts
from deepseek_jax.inference.generate import expert_mesh, known_ids, longest_text
from deepseek_jax.inference.memory import free_bytes
from deepseek_jax.inference.page_pool import PAGE_SIZE
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import ROWS, Weights
from deepseek_jax.progress import Bar

PAGES_SHARE = 0.7  # of the memory that is free beside the weights; the rest is for what a step needs


def open_batch(
    config: Config,
    weights: Weights,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh | None = None,
    *,
    num_rows: int,
    num_pages: int | None = None,
    num_positions: int | None = None,
    most_prefill_tokens: int = 2048,
    num_drafts: int = 0,
    drafting_rows: int | None = None,
    silent: bool = False,
    exact: bool = False,
    bulk: bool = False,
) -> DeviceBatch:
    """Return a batch whose programs are compiled.

    Args:
        config: model and execution.
        weights: as the training state has them, or in FP8 as a checkpoint stores them.
        tokenizer: of the model's training; ids that it lacks are never chosen.
        mesh: the mesh that decodes; by default the first device alone.
        num_rows: jobs that run at once, at least.
        num_pages: of each device, 64 tokens each; by default as many as `fitting_pages` tells.
        num_positions: longest sequence, prompt and new tokens; by default what the model knows.
        most_prefill_tokens: of prompts in a step and device, a power of two from 128 on.
        num_drafts: tokens that the MTP layer drafts for each row, up to 3; 1 is what it was trained for.
        drafting_rows: it drafts while at most so many rows decode (`acceptance.worth_rows`); by default always.
        silent: show no progress.
        exact: log-probabilities of tokens do not depend on what else runs (`inference.exact`).
        bulk: callers wait for whole answers (`inference.scheduler`): bursts are for all rows.

    Raises:
        ValueError: sizes out of range, a cache that does not fit, or more positions than the model knows.
        NotImplementedError: exact arithmetic, and not FP32 on one CPU device.
    """
    mesh = mesh or expert_mesh(config.model, 1)
    sizes: Any = {"num_rows": num_rows, "most_prefill_tokens": most_prefill_tokens, "num_drafts": num_drafts}
    check_opening(config, tokenizer, mesh, **sizes, num_pages=num_pages, num_positions=num_positions)
    num_positions = num_positions or longest_text(config)
    with jax.set_mesh(mesh):
        execution, known = decode_execution(config, mesh), known_ids(weights, tokenizer)
        placed = decode_weights(config.model, execution, known, mesh, num_drafts > 0)
    if num_pages is None:
        num_pages = fitting_pages(config, mesh, num_rows, num_positions, num_drafts)
    batch = DeviceBatch(
        config,
        placed,
        mesh,
        **sizes,
        num_pages=num_pages,
        num_positions=num_positions,
        eos=tokenizer.eos,
        drafting_rows=drafting_rows,
        exact=exact,
        bulk=bulk,
    )
    compile_batch(batch, silent)
    return batch


def check_opening(
    config: Config,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    num_rows: int,
    num_pages: int | None = None,
    num_positions: int | None = None,
    most_prefill_tokens: int = 2048,
    num_drafts: int = 0,
) -> None:
    """Refuse what `open_batch` cannot open, as far as it can be told before the weights are read.

    Raises:
        ValueError: as `open_batch`.
    """
    model, longest = config.model, longest_text(config)
    if num_positions is not None and not 1 <= num_positions <= longest:
        raise ValueError(f"num_positions = {num_positions} must be from 1 to {longest}, which the model knows")
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, and model.vocab_size is {model.vocab_size}; use"
            " the tokenizer of the model's training"
        )
    num_positions = num_positions or longest
    check_drafts(num_drafts, model)
    check_sizes(num_rows, 1 if num_pages is None else num_pages, num_positions, most_prefill_tokens)
    if num_pages is None:
        fitting_pages(config, mesh, num_rows, num_positions, num_drafts)
    else:
        check_pages(cache_bytes_per_token(model, decode_execution(config, mesh), num_drafts > 0), num_pages, mesh)


def compile_batch(batch: DeviceBatch, silent: bool) -> None:
    """Compile all programs of a batch, and show how far it is."""
    bars: list[Bar] = []

    def tell(_: int, total: int) -> None:
        if not bars:
            bars.append(Bar(total, "compile", "programs", silent=silent))
        bars[0].update(1)

    batch.compile(tell)
    for bar in bars:
        bar.close()


def fitting_pages(
    config: Config, mesh: jax.sharding.Mesh, num_rows: int, num_positions: int, num_drafts: int = 0
) -> int:
    """Return pages of each device: for all rows at their longest, or what `PAGES_SHARE` of the free memory holds.

    Call it when the weights are placed: before, the memory that they take counts as free.

    Raises:
        ValueError: not even one sequence fits.
    """
    devices = axis_size(mesh, ROWS)
    page_bytes = PAGE_SIZE * cache_bytes_per_token(config.model, decode_execution(config, mesh), num_drafts > 0)
    if mesh.local_devices[0].platform == "cpu":  # its devices share the memory
        page_bytes *= devices
    columns = -(-(num_positions + num_drafts) // PAGE_SIZE)
    fitting = int(PAGES_SHARE * free_bytes(mesh)) // page_bytes
    if fitting < columns:
        raise ValueError(
            f"a sequence of {num_positions} tokens takes {columns} pages of {page_bytes / 2**20:,.1f} MiB, and there is"
            f" room for {fitting} beside the weights; lower num_positions to {max(fitting, 1) * PAGE_SIZE}"
        )
    return min(rows_of_batch(num_rows, mesh) // devices * columns, fitting)
