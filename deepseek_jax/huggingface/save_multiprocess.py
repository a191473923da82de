"""Weights spread over processes, written into one folder that all of them share.

The missing files are dealt out in rounds, one to each process. In a round the processes go through the tensors of all
its files in step. One program that all of them run puts each tensor together from the devices that hold a part of it.
The process whose file the tensor belongs to hashes and writes it in a thread, while the next tensors are gathered.
Process 0 keeps the record.
"""

import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.huggingface.stored_tensors import StoredTensors
from deepseek_jax.safetensors.folder import RECORD
from deepseek_jax.safetensors.writer import CancelledError, Planned, ShardWriter

MAX_WAITING = 2  # tensors that wait for a process's disk


def write(
    folder: Path, new_writer: Callable[[], ShardWriter], tensors: StoredTensors, on_bytes: Callable[[int], None]
) -> None:
    """Write the missing shards of a conversion and the index. Every process calls it.

    Args:
        folder: of the conversion.
        new_writer: makes its writer. The first writer puts the record into the folder.
        tensors: of the weights, as the checkpoint stores them.
        on_bytes: called in process 0, with the number of bytes that all processes have written.

    Raises:
        ValueError: the processes do not share the folder.
        RuntimeError: another process failed; there, what failed is raised.
    """
    rank, count = jax.process_index(), jax.process_count()
    writer, missing, stack = None, [], contextlib.ExitStack()

    def begin() -> None:
        nonlocal writer, missing
        if rank and not (folder / RECORD).exists():
            raise ValueError(
                f"process {rank} does not see {folder / RECORD}, which process 0 wrote; choose a folder that all of"
                " them share"
            )
        writer = new_writer()
        if rank == 0:
            missing = stack.enter_context(writer.writing())

    with stack:
        _all_or_none(begin if rank == 0 else None)
        _all_or_none(begin if rank else None)
        flags = multihost_utils.broadcast_one_to_all(np.array([file in missing for file in writer.shards]))
        for files in itertools.batched(itertools.compress(writer.shards, flags), count):
            digest = _all_or_none(functools.partial(_write_round, writer, tensors, files))
            digests = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
            if rank == 0:
                writer.record({file: row.tobytes().hex() for file, row in zip(files, digests, strict=False)})
                on_bytes(sum(map(writer.num_bytes, files)))
        _all_or_none(stack.close)  # process 0 writes the index


def _all_or_none(action: Callable[[], Any] | None) -> Any:
    """Call `action` in this process, if it has one. If a call fails in one process, raise in all of them."""
    result = error = None
    try:
        result = action() if action else None
    except Exception as caught:  # whatever it is, the others must not wait for this process
        error = caught
    failed = multihost_utils.process_allgather(np.array(error is not None))
    if error:
        raise error
    if failed.any():
        raise RuntimeError(f"process {np.flatnonzero(failed)[0]} failed; what it printed says why")
    return result


def _write_round(writer: ShardWriter, tensors: StoredTensors, files: Sequence[str]) -> str:
    """Write one file per process; return the SHA-256 of this process's, zeros if it has none."""
    rank = jax.process_index()
    own_file = files[rank] if rank < len(files) else None
    ready: queue.Queue[np.ndarray | None] = queue.Queue(MAX_WAITING)
    failure = None

    def take(_: str) -> np.ndarray:
        array = ready.get()
        if array is None:
            raise CancelledError
        return array

    def give(array: np.ndarray | None) -> None:
        while not written.done():  # it may have failed
            with contextlib.suppress(queue.Full):
                ready.put(array, timeout=0.1)
                return

    with ThreadPoolExecutor(1) as pool:
        job = (
            functools.partial(writer.write_shard, own_file, take, lambda _: None, threading.Event())
            if own_file
            else bytes(32).hex
        )
        written: Future[str] = pool.submit(job)
        for jobs in itertools.zip_longest(*(_jobs(writer.shards[file], tensors) for file in files)):
            for file, names in zip(files, jobs, strict=True):
                if names is None:
                    continue
                fetched = tensors.fetch(names[0])
                if file != own_file or failure:
                    continue
                try:
                    values, scales = tensors.stored(names[0], *fetched)
                    for name in names:
                        give(scales if name in tensors.weight_of_scales else values)
                except Exception as error:  # the others go on fetching, and so does this process
                    failure = error
                    give(None)
        if failure:
            raise failure
        return written.result()


def _jobs(shard: Sequence[Planned], tensors: StoredTensors) -> Iterator[list[str]]:
    """Yield the names of a shard, a weight together with its scales if the shard has both."""
    names = [tensor.name for tensor in shard]
    weight_of = {name: tensors.weight_of_scales[name].name for name in names if name in tensors.weight_of_scales}
    for name, after in itertools.zip_longest(names, names[1:]):
        if weight_of.get(name) not in names:
            yield [name, after] if weight_of.get(after) == name else [name]
