"""Chips that a run may be planned for, and the TPUs among them as devices to compile for on any machine.

The libtpu wheel compiles for TPUs that are not there. The compiler also says how much of a chip's memory a program may
have; the rest is its own. What NVIDIA's cards have is their vendor's figure, and so are all rates.

Rates are of one JAX device, and bytes/s leave it in one direction. Which share of them programs reach is in `rates.py`.
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
BINARY = (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")
DECIMAL = (1e9, "GB"), (1e6, "MB"), (1e3, "kB")
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
        peak_bf16, peak_fp8: dense FLOP/s; 0: the device has no such products.
        hbm: bytes/s of its memory.
        link_in: bytes/s to its neighbours: over NVLink, or over all links of a TPU's torus together.
        link_out: bytes/s to devices of other nodes; of a TPU, whose pod is one torus, the same.
        node: devices that NVLink joins; 0: all of a pod.
        devices: JAX devices of one chip.
        torus_dims: dims of a TPU's torus; 0 on NVIDIA's cards, which are not compiled for.
        most_chips: TPUs of one pod.
    """

    name: str
    memory: int
    peak_bf16: float
    peak_fp8: float
    hbm: float
    link_in: float
    link_out: float
    node: int = 0
    devices: int = 1
    torus_dims: int = 0
    most_chips: int = 0

    @property
    def compiles(self) -> bool:
        """Whether a step can be compiled for this chip where there is none."""
        return self.torus_dims > 0

    def has(self, num_devices: int) -> bool:
        """Whether a pod has so many devices, and they fill a torus whose sides are powers of two; cards may be any."""
        fills = num_devices & (num_devices - 1) == 0
        return not self.compiles or (fills and num_devices <= self.devices * self.most_chips)

    @property
    def room(self) -> float:
        """Bytes of one device for what is computed: weights, moments, gradients and copies.

        On a TPU all of its memory: the compiler then decides. On a card four fifths, which leaves a fifth to
        activations: that is a rule for short sequences, not a measurement.
        """
        return self.memory if self.compiles else CARD_SHARE * self.memory


# Memory of TPUs: what the compiler of libtpu 0.0.48.1 gives a program ("exceeds available HBM (95.73G)"). Their rates:
# cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; a chip's links go both ways, and half of their sum leaves it.
# NVIDIA's rates: data sheets of the cards, dense ("without sparsity"); InfiniBand: one 400 Gbit/s port a card, of GB300
# 800 Gbit/s. H800: an H100 whose NVLink has 200 GB/s a direction (arXiv 2505.09343, section 4.1: some 160 are usable).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 197e12, 0, 819e9, 100e9, 100e9, torus_dims=2, most_chips=256),
        Chip("v5p", int(95.73 * GIB), 459e12, 0, 2765e9, 600e9, 600e9, torus_dims=3, most_chips=8960),
        Chip("v6e", int(31.24 * GIB), 918e12, 0, 1638e9, 400e9, 400e9, torus_dims=2, most_chips=256),
        Chip(
            "tpu7x", int(94.74 * GIB), 1153.5e12, 2307e12, 3690e9, 300e9, 300e9, 0, devices=2, torus_dims=3,
            most_chips=9216,
        ),
        Chip("h800", 80 * 10**9, 989e12, 1979e12, 3350e9, 200e9, 50e9, node=8),
        Chip("h100", 80 * 10**9, 989e12, 1979e12, 3350e9, 450e9, 50e9, node=8),
        Chip("h200", 141 * 10**9, 989e12, 1979e12, 4800e9, 450e9, 50e9, node=8),
        Chip("b200", 180 * 10**9, 2250e12, 4500e12, 8000e9, 900e9, 50e9, node=8),
        Chip("gb300", 279 * 10**9, 2500e12, 5000e12, 8000e9, 900e9, 100e9, node=72),
    )
}  # fmt: skip


def unit_of(total: float, units: tuple[tuple[float, str], ...] = BINARY) -> tuple[float, str]:
    """Return the first of `units` that `total` bytes reach, with its name; else the last."""
    return next((unit for unit in units if total >= unit[0]), units[-1])


def size_text(
    size: float, total: float | None = None, units: tuple[tuple[float, str], ...] = BINARY, digits: int = 2
) -> str:
    """Return a number of bytes as a person reads it, in the unit of `total` where it is a part of that."""
    unit, name = unit_of(size if total is None else total, units)
    return f"{size / unit:,.{digits}f} {name}"


def duration_text(seconds: float) -> str:
    """Return how long a run takes as a person reads it: in days, or less."""
    units = (86400, "days"), (3600, "hours"), (60, "minutes")
    length, name = next((unit for unit in units if seconds >= unit[0]), (1, "seconds"))
    return f"{seconds / length:,.1f} {name}" if seconds >= 1 else f"{seconds:.2g} seconds"


def find_topology(text: str) -> tuple[Chip, int]:
    """Return the chip and the number of JAX devices of a topology: `h800:2048` cards, `v5p:8x8x16` or `v5p:1024` chips.

    The sides of a torus multiply to its chips; libtpu names the torus of so many chips (`topology`).

    Raises:
        ValueError: the text is no topology, its chip is unknown or a pod has fewer.
    """
    name, colon, size = text.partition(":")
    chip = find_chip(name)
    sides = size.split("x")
    if not colon or not all(side.isdecimal() and int(side) for side in sides) or len(size) > 32:
        example = f"{name}:{'x'.join(['4'] * chip.torus_dims)}" if chip.compiles else f"{name}:64"
        raise ValueError(f"topology {text[:64]!r} has no number of devices; write {example}, for example")
    if len(sides) > 1 and len(sides) != chip.torus_dims:
        dims = f"a torus of {chip.torus_dims} dims" if chip.compiles else "no torus: write one number of cards"
        raise ValueError(f"topology {text!r} has {len(sides)} sides, and {name} has {dims}")
    chips = math.prod(int(side) for side in sides)
    if len(sides) > 1 and chips % HOST == 0:
        named = topology(chip, chips * chip.devices).partition(":")[2]
        if sorted(named.split("x")) != sorted(sides):
            raise ValueError(
                f"topology {text!r} is no torus that is compiled for: {chips} chips are compiled for as {named};"
                f" write {name}:{named}"
            )
    if chip.compiles and chips > chip.most_chips:
        raise ValueError(f"topology {text!r} has {chips} chips, and a pod of {name} {chip.most_chips}; choose fewer")
    return chip, chips * chip.devices


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
        ValueError: a pod has fewer chips, or they fill no torus.
    """
    if count & (count - 1):
        lower = 1 << (count.bit_length() - 1)
        raise ValueError(
            f"{count} devices fill no torus of {chip.name} whose sides are powers of two, as they are planned for;"
            f" choose {lower} or {2 * lower}"
        )
    if count > chip.devices * chip.most_chips:
        raise ValueError(
            f"{count} devices are more than a pod of {chip.name} has: {chip.most_chips} chips of {chip.devices} devices"
            " each; choose fewer, or another chip"
        )
    chips = max(HOST, 2 ** math.ceil(math.log2(-(-count // chip.devices))))
    sides = [2**i for i in range(chips.bit_length())]
    shapes = (s for s in itertools.combinations_with_replacement(sides, chip.torus_dims) if math.prod(s) == chips)
    return f"{chip.name}:{'x'.join(map(str, sorted(min(shapes, key=sum), reverse=True)))}"
