"""Processes that turn texts into ids.

The threads of `tokenizers` keep two cores busy, but not many more: they encode 7 MB/s on 16 cores, 16 processes 19.
`multiprocessing` would fork a program full of threads, or run its main module once more (and import jax with it), which
fails for a script without a guard. So this file is both sides. `Encoders` starts it as a script that imports tokenizers
but not jax, and talks to it through a socket:

    to a process      the tokenizer, then lists of texts
    from a process    for each list what `encode_texts` returns, or the exception that it raised

A process ends when its socket closes. So it never outlives the program, however that ends.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import tokenizers

from deepseek_jax.data.encoding import Ids, encode_texts
from deepseek_jax.files import in_order

BATCHES_PER_PROCESS = 2  # on their way at once: one is encoded, one waits


class Encoders(contextlib.AbstractContextManager):
    """Up to `num_processes` processes that encode; they start when there is work and end with the context."""

    def __init__(self, encoder: tokenizers.Tokenizer, num_processes: int):
        """Copy `encoder` as it is now; start no process yet."""
        self._encoder = encoder.to_str(), encoder.encode_special_tokens  # the string lacks the second
        self._num_processes = num_processes
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="encode")  # each waits for a process

    def __exit__(self, *error):
        """Kill the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()  # and the thread that waits for it gets an error
        self._threads.shutdown()
        for process in self._processes:
            process.close()

    def map(self, batches: Iterable[Sequence[str]]) -> Iterator[Ids]:
        """Yield the answers for each batch of texts, in order.

        At most `BATCHES_PER_PROCESS` batches per process are read ahead.

        Raises:
            ChildProcessError: a process was killed. What `encode_texts` raises in a process is raised here.
        """
        waiting = 0  # batches read and not yielded yet

        def with_processes() -> Iterator[Sequence[str]]:
            nonlocal waiting
            for batch in batches:
                if batch and len(self._processes) < min(self._num_processes, waiting + 1):
                    self._processes.append(_Process(self._encoder))
                    self._idle.put(self._processes[-1])
                waiting += 1
                yield batch

        for ids in in_order(self._threads, self._encode, with_processes(), BATCHES_PER_PROCESS * self._num_processes):
            waiting -= 1
            yield ids

    def _encode(self, texts: Sequence[str]) -> Ids:
        if not texts:
            return []
        process = self._idle.get()
        try:
            return process.encode(texts)
        finally:
            self._idle.put(process)  # a dead one too: other threads may be waiting for it, and would forever


class _Process:
    """This side of one process."""

    def __init__(self, encoder: tuple[str, bool]):
        self._encoder: tuple[str, bool] | None = encoder  # sent with the first texts: sending waits for the process
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # the program decides what Ctrl-C means
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path)), "TOKENIZERS_PARALLELISM": "false"},
            )

    def encode(self, texts: Sequence[str]) -> Ids:
        try:
            if self._encoder:
                _send(self._connection, self._encoder)
                self._encoder = None
            _send(self._connection, texts)
            answer = _receive(self._connection)
        except (EOFError, OSError) as error:
            status = self._process.wait()
            raise ChildProcessError(
                f"a process that tokenises ended with status {status}; -9 is often a lack of memory"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        self._connection.close()


def _serve(connection: Connection) -> None:
    """The other side: encode until the socket closes."""
    text, encode_special_tokens = _receive(connection)
    encoder = tokenizers.Tokenizer.from_str(text)
    encoder.encode_special_tokens = encode_special_tokens
    while True:
        texts = _receive(connection)
        try:
            answer = encode_texts(encoder, texts)
        except Exception as error:  # too little memory
            answer = error
        _send(connection, answer)


def _send(connection: Any, value: Any) -> None:
    """Send a value as bytes.

    `Connection.send` sends a view of a BytesIO. If that fails, the error's frames keep both, and collecting them prints
    "BufferError: Existing exports of data" wherever the program then is.
    """
    connection.send_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


def _receive(connection: Any) -> Any:
    return pickle.loads(connection.recv_bytes())


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError), Connection(int(sys.argv[1])) as connection:
        _serve(connection)
