"""Speed and memory of reading and writing checkpoints.

`python -m experiments.benchmarks.hf_benchmark --hf=/tmp/hf --gigabytes=8`

Makes a synthetic FP8 checkpoint (`experiments.benchmarks.synthetic_checkpoint`). Imports it twice into weights in FP8
on the first device, then exports these weights into another folder. Files are cold at the start of each
(`posix_fadvise`). A plain read of all files comes before and after each, because disks change their speed by the
minute; each is compared with the two plain reads around it. Memory is the peak of RssAnon (pages that belong to no
file), less the weights themselves if the device is the host. Prints records and, with --json, writes them.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from configs import deepseek_v3
from deepseek_jax.config import Config, Mesh, from_config_dict
from deepseek_jax.huggingface.contents import check, num_bytes
from deepseek_jax.huggingface.load import load
from deepseek_jax.huggingface.save import save
from deepseek_jax.inputs import new_file
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.safetensors.folder import Shards
from experiments import command, session
from experiments.benchmarks import synthetic_checkpoint
from pallas_kernels.bench import records

JSON = flags.DEFINE_string("json", None, "File for the records.")
KEEP = flags.DEFINE_bool("keep", False, "Keep both folders.")

PLAIN = "plain cold read"
READ_BYTES = 2**24
SAMPLE_SECONDS = 0.02


def main(_) -> None:
    """Make, measure, print."""
    json_file, folder = command.path_of(JSON, new_file), synthetic_checkpoint.target()
    source, target = folder / "source", folder / "target"
    config = from_config_dict(deepseek_v3.get_config())
    model = synthetic_checkpoint.sized(config.model, synthetic_checkpoint.GIGABYTES.value * 1e9)
    config = dataclasses.replace(config, model=model)
    shard_bytes = int(synthetic_checkpoint.SHARD_GIGABYTES.value * 1e9)
    synthetic_checkpoint.check_space(folder, 2 * num_bytes(model, fp8=True))
    session.start(keep_heap=False)
    mesh = make_mesh(Mesh(pipe=1, data=1, node=1, expert=1, tensor=1), jax.devices()[:1])
    synthetic_checkpoint.write(model, source, fp8=True, max_shard_bytes=shard_bytes)
    files = sorted(source.glob("*.safetensors"))
    phases = measure(config, mesh, source, target, files, shard_bytes)
    common = records.provenance("experiments.benchmarks.hf_benchmark", session.describe_device(mesh))
    written = [record | common for record in describe(phases, files)]
    for record in written:
        rate, memory = record["yardstick"]["value"], record["peak_anonymous_bytes_beyond_weights"] / 1e9
        share = f"{100 * record['value'] / rate:.0f}% of a plain cold read ({rate:.3f})"
        print(
            f"{record['mode']:36} {record['seconds']:7.2f} s  {record['value']:6.3f} GB/s, {share}  {memory:5.2f} GB"
            " anonymous"
        )
    if json_file:
        json_file.write_text(json.dumps(written, indent=1) + "\n")
    if not KEEP.value:
        shutil.rmtree(source)
        shutil.rmtree(target)


class Phase(NamedTuple):
    """One measured phase: a plain read, an import or the export."""

    mode: str
    seconds: float
    anonymous_bytes: int  # by which memory rose at most


def measure(
    config: Config, mesh: jax.sharding.Mesh, source: Path, target: Path, files: list[Path], shard_bytes: int
) -> list[Phase]:
    """Import `source` twice and export it to `target`, with plain reads around each; weights on the host do not count
    as memory of an import.
    """
    phases: list[Phase] = []
    weights = None
    with measured(phases, PLAIN, files):
        plain_read(files)
    for mode in ("import, programs compiled on the way", "import"):
        del weights
        jax.block_until_ready(jax.device_put(0))  # JAX frees NumPy's memory with its next call
        with measured(phases, mode, files):
            shards = Shards(source)
            check(shards, config.model, fp8=True)
            weights = jax.block_until_ready(load(shards, config, mesh, "fp8"))
        with measured(phases, PLAIN, files):
            plain_read(files)
    with measured(phases, "export", files):
        save(weights, config.model, target, fp8=True, max_shard_bytes=shard_bytes)
    with measured(phases, PLAIN, files):
        plain_read(files)
    on_host = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) if mesh.devices.flat[0].platform == "cpu" else 0
    return [
        phase._replace(anonymous_bytes=phase.anonymous_bytes - on_host) if phase.mode.startswith("import") else phase
        for phase in phases
    ]


def describe(phases: list[Phase], files: list[Path]) -> list[dict[str, Any]]:
    """Return a record of every phase that has a plain read before and after it."""
    size = sum(file.stat().st_size for file in files)
    found = []
    for before, phase, after in zip(phases[::2], phases[1::2], phases[2::2], strict=False):
        rate = 2 * size / (before.seconds + after.seconds) / 1e9
        found.append(
            {"op": "convert_hf", "mode": phase.mode, "precision": "fp8", "shape": {"bytes": size, "files": len(files)}}
            | {"value": size / phase.seconds / 1e9, "unit": "GB/s"}
            | {"yardstick": {"name": PLAIN, "version": "mean of before and after", "value": rate}}
            | {"yardstick_values": [size / plain.seconds / 1e9 for plain in (before, after)]}
            | {"seconds": phase.seconds, "peak_anonymous_bytes_beyond_weights": phase.anonymous_bytes}
        )
    return found


def plain_read(files: list[Path]) -> None:
    """Read every byte once, into one buffer."""
    buffer = bytearray(READ_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


@contextlib.contextmanager
def measured(phases: list[Phase], mode: str, files: list[Path]) -> Iterator[None]:
    """Drop `files` from the page cache; append the phase to `phases`."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def sample():
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        done.set()
        sampler.join()
    phases.append(Phase(mode, seconds, max(peak[0], anonymous_bytes()) - before))
    print(f"{mode}: {seconds:.1f} s", flush=True)


def anonymous_bytes() -> int:
    """Return RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    command.run(main)
