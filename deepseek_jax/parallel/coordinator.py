"""The coordinator of several processes, in a process of its own.

JAX runs this service inside process 0, and with it dies the service: JAX's C++ then ends all others with a stack and
exit code 134. So process 0 starts it as a child, which outlives it. A killed process 0 is like any other killed
process: the others notice it (`watch`) and end with a line.

JAX has no option for this. But the clients only ask that somebody answers at the address, so process 0 gives the
service that JAX insists on starting an address that nobody knows. The child ends when its pipe from process 0 is closed
and no process is connected any more. It ignores signals that ask it to stop, which a scheduler sends to all processes
of a job. What kills both, such as the end of a machine or of a container, still ends the others with 134.

This file is also the program of the child. It loads `jaxlib`, not `jax`, and has 116 MiB.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

READY = "ready"
FAILED = "failed: "  # and why, among lines of the service's log; it may crash (SIGSEGV) before it says so
UNKNOWN = 3  # exit code: this jaxlib has another service than the one that we know
LINGER_SECONDS = 60.0  # for the others to notice that process 0 is gone, and to end
CONNECTED = "01"  # TCP_ESTABLISHED of Linux
IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")

_child: subprocess.Popen | None = None  # its pipe is open as long as this process lives


class CoordinatorError(RuntimeError):
    """The service did not start."""


def start(address: str, num_processes: int, options: dict[str, Any]) -> bool:
    """Start the service of `num_processes` processes at `address` in a child.

    Args:
        address: host:port where it listens.
        num_processes: that will connect.
        options: keyword arguments of jaxlib's `get_distributed_runtime_service`.

    Returns:
        False if the installed jaxlib does not have the service as we know it: then JAX should start its own.

    Raises:
        CoordinatorError: the service did not start.
    """
    global _child
    arguments = json.dumps({"address": address, "num_nodes": num_processes, **options})
    child = subprocess.Popen(
        [sys.executable, "-P", __file__, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C and a closed terminal do not reach it
    )
    assert child.stdout is not None  # a pipe
    said = log = ""
    for line in child.stdout:
        if line.strip() == READY:
            child.stdout.close()
            _child = child
            return True
        if line.startswith(FAILED):
            said = line.removeprefix(FAILED).strip()
        log = line.strip() or log
    child.communicate()
    if child.returncode == UNKNOWN:
        return False
    raise CoordinatorError(said or log or f"exit code {child.returncode}")


def serve(arguments: dict[str, Any]) -> NoReturn:
    """Serve until process 0 is gone and nobody is connected any more."""
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        jaxlib = importlib.import_module("jaxlib._jax")  # the service is nowhere else
        service = jaxlib.get_distributed_runtime_service(**arguments)
    except Exception as error:
        print(f"\n{FAILED}{error}", flush=True)
        unknown = isinstance(error, ImportError | AttributeError | TypeError)
        os._exit(UNKNOWN if unknown else 1)  # a service that did not start may crash when Python takes it down
    print(READY, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the service's own log, and the terminal of process 0, which should not wait for this one
        os.dup2(nowhere, stream)
    sys.stdin.buffer.read()
    end = time.monotonic() + LINGER_SECONDS
    port = int(arguments["address"].rpartition(":")[2])
    while is_connected(port) and time.monotonic() < end:
        time.sleep(0.1)
    del service
    os._exit(0)


def is_connected(port: int) -> bool:
    """Return whether anybody is connected to this machine's `port`; always True where the system does not tell."""
    tables = [path for path in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")) if path.exists()]
    local = f":{port:04X}"
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return not tables or any(row[1].endswith(local) and row[3] == CONNECTED for row in rows)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
