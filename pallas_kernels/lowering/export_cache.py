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
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jaxlib

LOGGER = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]  # whose text a kernel depends on


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered function of arrays.

    Attributes:
        exported: list of arrays -> list of arrays.
        result: what the function returns, with the numbers of the list in place of the arrays.
    """

    exported: jax.export.Exported
    result: Any


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
        kept = self.folder if jax.config.jax_enable_compilation_cache else None
        path = kept and kept / f"{name}-{_digest(identity, shapes)}"
        program = (path and _read(path)) or _lower(function, name, shapes, path, self.platforms[jax.default_backend()])
        self.compilers.submit(_compile, program.exported, shapes)
        results = program.exported.call(arrays)
        return jax.tree.map(lambda i: results[i], program.result)


_current: ExportCache | None = None


def enable(folder: Path | None) -> None:
    """Lower kernels apart from now on, in this whole process, and keep them in `folder`, if there is one."""
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


def _read(path: Path) -> Program | None:
    try:
        return pickle.loads(path.read_bytes()) if path.exists() else None
    except Exception as error:  # noqa: BLE001  unpickling raises what it likes
        LOGGER.warning("%s is damaged and made again: %r", path, error)
        return None


def _lower(function: Callable, name: str, shapes: list, path: Path | None, platform: str) -> Program:
    result = None

    def flat(arrays):
        nonlocal result
        leaves, tree = jax.tree.flatten(function(arrays))
        result = jax.tree.unflatten(tree, range(len(leaves)))
        return leaves

    flat.__name__ = name
    export = jax.export.export(jax.jit(flat), platforms=[platform])
    with ThreadPoolExecutor(1) as fresh:  # JAX's contexts are the thread's: here there are none
        exported = fresh.submit(export, shapes).result()
    # no derivative, which pickle could not keep
    program = Program(dataclasses.replace(exported, _get_vjp=None), result)
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(pickle.dumps(program))
            unfinished.replace(path)
        except OSError as error:
            LOGGER.warning("%s is not kept for the next time: %s", name, error)
    return program


def _compile(exported: jax.export.Exported, shapes: list) -> None:
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
