"""How the processes of a run find each other.

JAX's coordinator, a service that process 0 starts (`coordinator`), connects them. If it cannot, JAX waits for five
minutes and then aborts in C++ with a stack. Here an address that nobody answers, a port that is taken and processes
that do not come are a line each, within `--connect_seconds`. `watch` is what follows.

The coordinator has no password: who reaches its port can read and write its keys and stop the run. Its address should
be one of a private network. For an address of this machine (localhost) it listens to this machine only. JAX can encrypt
and authenticate it with certificates (mTLS): set JAX_MTLS_CERT_FILE, JAX_MTLS_KEY_FILE and JAX_MTLS_CA_FILE.
"""

import errno
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from deepseek_jax.inputs import is_loopback
from deepseek_jax.parallel import coordinator as service
from deepseek_jax.parallel import watch
from deepseek_jax.parallel.watch import ProcessError

CONNECT_SECONDS = 60  # for all processes to find each other
HEARTBEAT_SECONDS = 60  # of JAX's own watch, which ends with a stack of C++; ours comes first
PORT_SECONDS = 5.0  # for the coordinator of an earlier start to end: a requeued job may overlap the one before
FAREWELL_SECONDS = 3600  # for which a process that is done waits for the others: process 0 writes the report
CERTIFICATES = ("mtls_cert_file", "mtls_key_file", "mtls_ca_file", "mtls_peer_uri_prefix")


def join(coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: int) -> None:
    """Join the other processes of a run; without a coordinator's address JAX finds them itself (SLURM, TPU pods, ...).

    Args:
        coordinator: host:port of process 0.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        seconds: after these without all processes, the attempt ends.

    Raises:
        ProcessError: process 0 cannot be reached, or its port is taken. If the others do not come, this process ends
            with a line and exit code 1: JAX waits for them in C++, which no exception reaches.
    """
    if coordinator is None:
        coordinator, num_processes, process_id = _detect(seconds)
    where = "the coordinator" if coordinator is None else coordinator
    joined = threading.Event()
    late = threading.Thread(target=_end_late, args=(joined, where, num_processes, seconds), daemon=True)
    options: dict[str, Any] = {
        "initialization_timeout": 2 * seconds,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": FAREWELL_SECONDS,
    }
    address = None
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if process_id == 0:
            address = _bind_address(host, int(port), min(PORT_SECONDS, seconds))
        else:
            _reach(host, int(port), seconds)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    late.start()
    try:
        if address is not None:
            options["coordinator_bind_address"] = _serve(address, num_processes or 1)
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    except ValueError as error:  # JAX found no cluster
        raise ValueError(
            f"no cluster was found to join ({error}); --distributed works on TPU pods, SLURM, Open MPI and Kubernetes."
            " Elsewhere give --coordinator=host:port, --num_processes and --process_id"
        ) from error
    finally:
        joined.set()
    watch.start()


def _end_late(joined: threading.Event, where: str, num_processes: int | None, seconds: float) -> None:
    if joined.wait(seconds):
        return
    count = "all processes" if num_processes is None else f"all {num_processes} processes"
    name = getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).name
    print(
        f"{name}: {count} did not meet at {where} within {seconds:g} s: start the others, and check that their"
        " --num_processes and --process_id fit, or raise --connect_seconds",
        file=sys.stderr,
    )
    watch.end(1)


def _detect(seconds: int) -> tuple[str | None, int | None, int | None]:
    """Return coordinator, number of processes and index of this one as JAX finds them; None for what it does not."""
    from jax._src import clusters  # JAX shows it nowhere else, and `initialize` asks it too late for `coordinator`

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(address, None, None, [], None, 2 * seconds)
    return found[:3] if None not in found else (None, None, None)


def _serve(address: str, num_processes: int) -> str:
    """Start the coordinator at `address`; return the address for the service that JAX starts in process 0."""
    certificates = {name: getattr(jax.config, f"jax_{name}", None) for name in CERTIFICATES}
    options = {
        "heartbeat_timeout": HEARTBEAT_SECONDS,
        "shutdown_timeout": FAREWELL_SECONDS,
        **{name: value for name, value in certificates.items() if value is not None},
    }
    try:
        if num_processes == 1 or service.start(address, num_processes, options):
            return "127.0.0.1:0"  # which nobody knows
    except service.CoordinatorError as error:
        raise ProcessError(f"process 0 cannot start the coordinator at {address} ({error})") from error
    logging.warning("this jaxlib starts its coordinator in process 0 only: if that is killed, the others end with 134")
    return address


def _bind_address(host: str, port: int, seconds: float) -> str:
    """Return where the coordinator listens: only to this machine if its address is this machine's own.

    Raises:
        ProcessError: the port is taken, and was not freed within `seconds`.
    """
    local = is_loopback(host.strip("[]"))
    address = (host.strip("[]") if local else "", port)
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                return f"{host}:{port}" if local else f"[::]:{port}"
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                    raise ProcessError(
                        f"process 0 cannot listen at port {port} ({error.strerror}); choose another port for"
                        " --coordinator, or wait until the processes of an earlier start have ended"
                    ) from error
        time.sleep(0.1)


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until something listens at `host:port`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=min(seconds, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ProcessError(
                    f"the coordinator {host}:{port} was not reached within {seconds:g} s"
                    f" ({error.strerror or error}); start process 0 there, or check the address and the firewall"
                ) from error
        time.sleep(min(1.0, seconds / 10))
