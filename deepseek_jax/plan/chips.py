"""Chips that a run may be planned for, and the TPUs among them as devices to compile for on any machine.

The libtpu wheel compiles for TPUs that are not there. The compiler also says how much of a chip's memory a program may
have; the rest is its own. What NVIDIA's cards have is their vendor's figure.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30
# What libtpu asks of a machine before it compiles for TPUs that the machine lacks. It reads this once, when it loads.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the machine's own accelerator, if there is one, stays free
    "TPU_SKIP_MDS_QUERY": "1",  # no question to Google Cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: otherwise each start prints a warning
    "TPU_WORKER_HOSTNAMES": "localhost",
}
HOST = 4  # chips of one TPU host, two by two: the smallest topology


CARD_SHARE = 0.8  # of a card's memory for what is computed


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
        name: what `--chip` says; of a TPU it is libtpu's name.
        memory: bytes of one JAX device that programs may use.
        devices: JAX devices of one chip.
        torus_dims: dims of a TPU's torus; 0 on NVIDIA's cards, which are not compiled for.
        most_chips: TPUs of one pod.
    """

    name: str
    memory: int
    devices: int = 1
    torus_dims: int = 0
    most_chips: int = 0

    @property
    def compiles(self) -> bool:
        """Whether a step can be compiled for this chip where there is none."""
        return self.torus_dims > 0

    @property
    def room(self) -> float:
        """Bytes of one device for what is computed: weights, moments, gradients and copies.

        On a TPU all of its memory: the compiler then decides. On a card four fifths, which leaves a fifth to
        activations: that is a rule for short sequences, not a measurement.
        """
        return self.memory if self.compiles else CARD_SHARE * self.memory


# TPUs: what the compiler of libtpu 0.0.48.1 gives a program ("exceeds available HBM (95.73G)").
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), torus_dims=2, most_chips=256),
        Chip("v5p", int(95.73 * GIB), torus_dims=3, most_chips=8960),
        Chip("v6e", int(31.24 * GIB), torus_dims=2, most_chips=256),
        Chip("tpu7x", int(94.74 * GIB), devices=2, torus_dims=3, most_chips=9216),
        Chip("h100", 80 * 10**9),
        Chip("h200", 141 * 10**9),
        Chip("b200", 180 * 10**9),
    )
}


def find_chip(name: str) -> Chip:
    """Return the chip of a name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in CHIPS:
        raise ValueError(f"chip {name!r} is unknown; choose one of {', '.join(CHIPS)}")
    return CHIPS[name]


def prepare() -> None:
    """Let libtpu compile on a machine without a TPU; call it before JAX starts.

    Raises:
        ValueError: the libtpu wheel is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu, which compiles for TPUs, is not installed; on Linux x86-64: pip install -c requirements.lock -e"
            " '.[tpu]', or plan without a TPU's --chip"
        )
    os.environ.update(ENVIRONMENT)


def absent_devices(chip: Chip, count: int) -> list[Any]:
    """Return `count` JAX devices of a TPU topology that this machine need not have; `prepare` comes first.

    Raises:
        ValueError: the chip is not a TPU, or the compiler refuses the topology.
    """
    if not chip.compiles:
        raise ValueError(f"{chip.name} is not a TPU: its step is compiled on the card itself; plan without compiling")
    name = topology(chip, count)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu refuses {count} devices as {name}: {error}; choose another number") from error
    return devices[:count]


def topology(chip: Chip, count: int) -> str:
    """Return the name of the smallest topology of whole hosts with `count` devices: as near to a cube as it can be.

    Fewer devices than a host has are a part of it.

    Raises:
        ValueError: a pod has fewer chips.
    """
    if count > chip.devices * chip.most_chips:
        raise ValueError(
            f"{count} devices are more than a pod of {chip.name} has: {chip.most_chips} chips of {chip.devices} devices"
            " each; choose fewer, or another chip"
        )
    chips = max(HOST, 2 ** math.ceil(math.log2(-(-count // chip.devices))))
    sides = [2**i for i in range(chips.bit_length())]
    shapes = (s for s in itertools.combinations_with_replacement(sides, chip.torus_dims) if math.prod(s) == chips)
    return f"{chip.name}:{'x'.join(map(str, sorted(min(shapes, key=sum), reverse=True)))}"
