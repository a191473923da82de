"""Kernels that a machine lowers once, and that are compiled side by side before the program that calls them.

The problem. The FP8 training step of configs/v3_5b.py calls 69 different kernels, each made for its shapes. JAX turns
each into the language of Mosaic GPU in Python, 0.4 s apiece, and XLA compiles them one after the other in the middle of
compiling the step. JAX's persistent cache keeps what the compiler made, but asks for it by the lowered program: every
start pays for lowering. And a lowered kernel names the lines of the call stack that led to it, so that a change in any
file on the way, or another command, is a miss.

The choice. A kernel's call is a program of its own (`jax.export`), which the caller's program contains:

    lowered     in a fresh thread, which knows nothing of the caller's mesh, axes and call stack; kept in a file named
                by all that the program depends on: the operation, its options and shapes, the text of this package,
                JAX, the device
    compiled    by a pool of threads. Mosaic GPU keeps what it compiled for the rest of the process, so the caller's
                program finds it, and JAX's persistent cache keeps it for programs that differ elsewhere

A file has one line of JSON (format, key, SHA-256) and JAX's own serialisation (`Exported.serialize`), a table of bytes
that is read, never executed. The program in it is code all the same, so files count only in folders that nobody else
can write (`trust`), and only if their digests and types are right. Others are ignored with a warning.

The kernels stay the same but for the lines they name. The same step for one H100, on a machine with two CPU cores,
2026-11:

                               in the caller's program        ahead
    trace and lower            31 s                           32 s; 2 s from files (before `layout_inference`, 52 s)
    compile, CPU time          97 s                           46 s, and 45 s in the pool

Only on GPUs: Mosaic lowers kernels for TPUs quickly. And only after `enable`: in a test, an error whose call stack ends
in the kernel is worth more.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.export import Exported

from pallas_kernels.lowering import trust

LOGGER = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]  # whose text a kernel depends on
FORMAT = "lowered kernel 1"
LARGEST_FILE = 64 << 20  # bytes; a product for Hopper has 0.2 MB


@dataclasses.dataclass(frozen=True)
class ExportCache:
    """Kernels that are lowered apart from the programs that call them.

    Attributes:
        folder: where they are kept for the next process, if anywhere.
        platforms: what `jax.export` calls the platforms whose kernels are lowered apart, by JAX's names for them.
    """

    folder: Path | None
    platforms: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"gpu": "cuda"})

    def applies(self) -> bool:
        """Whether a kernel that is called now is lowered apart."""
        return jax.default_backend() in self.platforms

    @functools.cached_property
    def compilers(self) -> ThreadPoolExecutor:
        """The threads that compile kernels while their caller is traced."""
        return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile-kernel")

    def call(
        self, function: Callable[[list[jax.Array]], Any], name: str, identity: Any, arrays: list[jax.Array]
    ) -> Any:
        """Return `function(arrays)`, lowered apart and compiled meanwhile.

        Args:
            function: of arrays alone.
            name: of the operation.
            identity: the `repr` of which, with the shapes, says what the function computes.
            arrays: its operands.
        """
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        platform = self.platforms[jax.default_backend()]
        folder = self.trusted_folder if jax.config.jax_enable_compilation_cache else None
        path = folder and folder / f"{name}-{_digest(identity, shapes)}"
        exported = (path and _read(path, shapes, platform)) or _lower(function, name, shapes, path, platform)
        self.compilers.submit(_compile, exported, shapes)
        return exported.call(arrays)

    @functools.cached_property
    def trusted_folder(self) -> Path | None:
        """The folder, if there is one and only this user can write there; otherwise a warning says why not."""
        fault = self.folder and trust.fault_of(self.folder)
        if not fault:
            return self.folder
        LOGGER.warning(
            "Kernels are not kept in %s: %s, and programs from there would run as you. Take the right to write from"
            " others (chmod go-w), or set JAX_COMPILATION_CACHE_DIR to a folder of your own",
            self.folder,
            fault,
        )
        return None


_current: ExportCache | None = None


def enable(folder: Path | None) -> None:
    """Lower kernels apart from now on, in this whole process, and keep them in `folder`, if there is one.

    Missing folders are made now, for this user alone: made later, by JAX's own cache, others might write there.
    """
    if folder:
        try:
            trust.make_private(folder)
        except OSError as error:
            LOGGER.warning("Kernels are not kept for the next time: %s", error)
            folder = None
    _use(ExportCache(folder))


@contextlib.contextmanager
def using(cache: ExportCache | None) -> Iterator[None]:
    """Lower kernels by `cache` within this block, whatever the thread; None lowers them within their callers."""
    before, flag = _current, jax.config.jax_export_ignore_forward_compatibility
    _use(cache)
    try:
        yield
    finally:
        _use(before)
        jax.config.update("jax_export_ignore_forward_compatibility", flag)


def current() -> ExportCache | None:
    """Return the cache by which kernels are lowered here, if any."""
    return _current if _current and _current.applies() else None


def _use(cache: ExportCache | None) -> None:
    global _current
    _current = cache
    if cache:  # the same kernels as without export; files are for one version
        jax.config.update("jax_export_ignore_forward_compatibility", True)


def _read(path: Path, shapes: list, platform: str) -> Exported | None:
    """Return the program in a file, or None if there is none, or not the one that is wanted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if fault := trust.fault_of(path):
                raise ValueError(fault)
            content = file.read(LARGEST_FILE + 1)
        return _parse(content, path.name, shapes, platform)
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  what JAX raises for a table that it cannot read is not documented
        LOGGER.warning("%s is not used, and made again: %s", path, error)
        return None


def _parse(content: bytes, key: str, shapes: list, platform: str) -> Exported:
    header, newline, program = content[:LARGEST_FILE].partition(b"\n")
    try:
        described = json.loads(header) if newline else None
    except ValueError:
        described = None
    if described != _header(key, program):
        raise ValueError("it is damaged, or not a kernel of this name")
    exported = jax.export.deserialize(bytearray(program))
    found = [(x.shape, x.dtype) for x in exported.in_avals], exported.platforms, exported.nr_devices
    if found != ([(x.shape, x.dtype) for x in shapes], (platform,), 1):
        raise ValueError(f"its program is for other arrays or devices: {found}")
    return exported


def _header(key: str, program: bytes) -> dict[str, str]:
    return {"format": FORMAT, "key": key, "sha256": hashlib.sha256(program).hexdigest()}


def _lower(function: Callable, name: str, shapes: list, path: Path | None, platform: str) -> Exported:
    def kernel(arrays):
        return function(arrays)

    kernel.__name__ = name
    export = jax.export.export(jax.jit(kernel), platforms=[platform])
    with ThreadPoolExecutor(1) as fresh:  # JAX's contexts are the thread's: here there are none
        program = bytes(fresh.submit(export, shapes).result().serialize())
    if path:
        try:
            trust.make_private(path.parent)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.unlink(missing_ok=True)
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(json.dumps(_header(path.name, program)).encode() + b"\n" + program)
            unfinished.replace(path)
        except OSError as error:
            LOGGER.warning("%s is not kept for the next time: %s", name, error)
    return jax.export.deserialize(bytearray(program))  # the same object as from the file


def _compile(exported: Exported, shapes: list) -> None:
    jax.jit(exported.call).lower(shapes).compile()


def _digest(identity: Any, shapes: list) -> str:
    device = jax.devices()[0]
    described = identity, shapes, device.device_kind, getattr(device, "core_count", None), jax.config.jax_enable_x64
    return hashlib.sha256(repr((described, _sources(), jax.__version__, jaxlib.__version__)).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """Return a digest of this package's text."""
    text = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        text.update(path.read_bytes())
    return text.hexdigest()
