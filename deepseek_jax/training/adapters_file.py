"""`adapters.json` of a run that trains adapters: which weights have them, and the base that they are of.

Adapters mean something beside one base alone, and that is read anew at every start, export and answer. So the file has
its fingerprint, and another base is refused. One that moved is the same base.

    base                     its fingerprint is a SHA-256 over
    a run's checkpoint       the fingerprints of its arrays, which its record holds: of every element
    a released checkpoint    name, dtype and shape of every tensor, and 4 KiB from the middle of its bytes

The second is a sample: to hash V3 whole would read 700 GB more. Scales of experts are smaller than it, so a checkpoint
that was quantised again differs in them. What it misses: changes outside the samples alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import jax

from deepseek_jax.adapters import Lora
from deepseek_jax.config import Config, convert
from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import read_json, shown
from deepseek_jax.safetensors.folder import Shards
from deepseek_jax.safetensors.header import Entry
from deepseek_jax.training.origin import KEY, Origin, find_origin
from deepseek_jax.training.record import read_sealed
from deepseek_jax.training.saved import CHECKPOINTS, stored_steps
from deepseek_jax.training.workdir import ADAPTERS

SAMPLE_BYTES = 4096  # of a tensor: a page, which costs as much to read as one byte
WEIGHTS = ("['params']", "['router_bias']")  # of the arrays of a checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptersFile:
    """What the file holds.

    Attributes:
        lora: which weights have adapters.
        base: fingerprint of the base.
    """

    lora: Lora
    base: str


def claim_adapters(workdir: Path, lora: Lora | None, base: str) -> None:
    """Write into a workdir which weights have adapters, and of which base; call it just before `claim_workdir`.

    Without adapters the file of a start that was killed here is removed.
    """
    if jax.process_index() > 0:
        return
    if lora is None:
        (workdir / ADAPTERS).unlink(missing_ok=True)
    else:
        content = dataclasses.asdict(AdaptersFile(lora=lora, base=base))
        write_atomically(workdir / ADAPTERS, json.dumps(content, indent=1) + "\n")


def read_adapters(workdir: Path) -> Lora | None:
    """Return which weights of a run have adapters; None: it trains all weights."""
    found = read_adapters_file(workdir)
    return found.lora if found else None


def check_base(config: Config, workdir: Path) -> str:
    """Return the fingerprint of the base that `config` names, which must be the one that the run in `workdir` had.

    Raises:
        ValueError: it is another base, it is missing, or it is a run's newest checkpoint, whichever that is.
    """
    known = read_adapters_file(workdir)
    name = shown(config.training.initial_weights)
    try:
        origin = find_origin(config)
        assert origin is not None  # `posttraining.settings.read` asks for one
        found = base_fingerprint(origin)
    except ValueError as error:
        if known is None:
            raise
        remedy = f"{error}. If the base of these adapters has moved, {_where_to_name_it(workdir)}"
        raise ValueError(remedy) from error
    if known and known.base != found:
        raise ValueError(
            f"{KEY} = {name!r} is another base than the one that the adapters in {workdir} were trained on; "
            f"{_where_to_name_it(workdir)}; or train adapters of this one in another --workdir"
        )
    return found


def base_fingerprint(origin: Origin) -> str:
    """Return the fingerprint of a base: equal for every copy of it."""
    if not origin.run:
        return _digest(_samples(Shards(origin.folder).entries.values()))
    steps = stored_steps(origin.folder)
    if origin.step is None and steps:
        raise ValueError(
            f"{KEY} = {shown(str(origin.folder))!r} changes when that run goes on, and adapters are of one base; name a"
            f" step: {origin.folder}@{max(steps)}"
        )
    if origin.step not in steps:
        raise ValueError(f"{KEY}: {origin.folder} has no checkpoint of step {origin.step}; it has {steps or 'none'}")
    arrays = read_sealed(origin.folder / CHECKPOINTS / str(origin.step) / "run")["fingerprints"]
    return _digest(f"{path} {number}".encode() for path, number in sorted(arrays.items()) if path.startswith(WEIGHTS))


def base_for_peft(config: Config, named: str | None) -> str:
    """Return what PEFT opens the base of a run of adapters by: `named`, or the folder that the run began with.

    Raises:
        ValueError: the base is a run of ours, which PEFT cannot open, or the folder has gone, and none is named.
    """
    if named:
        return named
    origin = find_origin(config)
    assert origin is not None  # `posttraining.settings.read` asks for one
    if origin.run:
        raise ValueError(
            f"{KEY} = {shown(config.training.initial_weights)!r} is a run, which PEFT cannot open; export it"
            f" (experiments.convert_hf export --workdir={origin.folder} --step={origin.step} --precision=bf16"
            " --hf=BASE) and give --base=BASE"
        )
    return str(origin.folder.absolute())


def _where_to_name_it(workdir: Path) -> str:
    return (
        f"name where theirs is now: initial_weights in {workdir / 'config.json'} for export, generate and serve, or"
        " --initial where it trains on"
    )


def read_adapters_file(workdir: Path) -> AdaptersFile | None:
    """Return what the file of a run says; None: the run trains all weights."""
    path = workdir / ADAPTERS
    return convert(AdaptersFile, read_json(path), str(path)) if path.exists() else None


def _samples(entries: Iterable[Entry]) -> Iterable[bytes]:
    """Yield what is hashed of each tensor, in an order that does not depend on the files they are in."""
    with contextlib.ExitStack() as opened:
        files: dict[Path, int] = {}
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.file not in files:
                files[entry.file] = os.open(entry.file, os.O_RDONLY)
                opened.callback(os.close, files[entry.file])
            yield f"{entry.name} {entry.dtype} {list(entry.shape)}".encode()
            size = min(entry.num_bytes, SAMPLE_BYTES)
            yield os.pread(files[entry.file], size, entry.offset + (entry.num_bytes - size) // 2)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
