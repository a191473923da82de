"""Programs: a pure function, the sections of the configuration that it reads, and a mesh.

`jit_on` jits one; `resolve` replaces every "auto" of `execution` by what it means on the mesh. The key of a program is
what it reads, so two configurations that differ elsewhere (name, data, schedules) share it.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jaxlib import xla_client

from deepseek_jax.config import Config, Execution
from deepseek_jax.parallel.host_memory import check_host_memory
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import CONTEXT, EXPERTS
from pallas_kernels import GROUP, dispatch

SPLASH_BLOCK = 128  # the kernel's smallest
# A pass of XLA for TPUs that sums what micro-batches give before it is reduced over devices. To look for such sums in
# V3's step took the compiler's memory from 0.8 to 8.0 GB (experiments/log.md). On GPUs XLA does not do it unless asked.
NOT_ON_TPU = "while-loop-all-reduce-code-motion"
MOST_PROGRAMS = 64  # that a process remembers; each keeps its compiled executables alive


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def jit_on(
    function: Callable,
    execution: Execution,
    mesh: jax.sharding.Mesh,
    *static: Any,
    donate: tuple[int, ...] = (),
    cublas=False,
    trains=False,
) -> Callable:
    """Jit `function(*static, *arrays)` so that "fp32" is FP32 everywhere; the same arguments give the same program.

    Unless told not to, GPUs multiply FP32 in TF32 and TPUs in BF16. On a GPU cuBLAS alone does these products: choosing
    among Triton kernels of full precision took more than 500 s for `tiny` on an H200, against 10 s without them
    (experiments/log.md).

    Args:
        function: defined once, at the top of a module: a new function object is a new program.
        execution: says the precision.
        mesh: where the program runs; call it under `jax.set_mesh(mesh)`.
        static: hashable values: what the function reads of the configuration.
        donate: positions of the donated arrays, counted without `static`.
        cublas: whether on a GPU cuBLAS alone does the products in other precisions, too: for those of a prompt, XLA
            chose Triton kernels that took longer; those of adapters are too many to choose for (experiments/log.md).
        trains: whether this is a train step, which is compiled for TPUs without the pass `NOT_ON_TPU`, for the sake of
            the compiler's memory. So what is reduced after each micro-batch is not summed before. What that costs or
            saves in the step's time on a TPU was not measured.
    """
    platform = mesh.devices.flat[0].platform
    exact = execution.precision == "fp32" and platform != "cpu"

    def run(*arrays):
        with jax.default_matmul_precision("highest" if exact else None):
            return function(*static, *arrays)

    options: dict[str, Any] = {}
    if trains and platform == "tpu":
        options = {"xla_disable_hlo_passes": _disabled_on_tpu()}
    if (exact or cublas) and platform == "gpu":
        options = {"xla_gpu_enable_triton_gemm": False}
    return jax.jit(run, donate_argnums=donate, compiler_options=options or None)


def _disabled_on_tpu() -> str:
    """Return the passes that XLA_FLAGS disables, and `NOT_ON_TPU`: a program's option takes the place of the flag's."""
    flags = xla_client.CompileOptions().executable_build_options.debug_options.xla_disable_hlo_passes
    passes = [each.strip() for each in flags.split(",") if each.strip()]
    return ",".join(passes if NOT_ON_TPU in passes else [*passes, NOT_ON_TPU])


def resolve_for(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """Return `config` with every "auto" replaced by what it means on this mesh; see `resolve`.

    Raises:
        ValueError, NotImplementedError: as `resolve`.
        ValueError: layer inputs are to lie in host memory, and there is none.
        NotImplementedError: FP8 on a GPU that the kernels are not for.
    """
    device = mesh.devices.flat[0]
    capability = str(getattr(device, "compute_capability", dispatch.HOPPER))
    if config.execution.precision == "fp8" and device.platform == "gpu" and capability != dispatch.HOPPER:
        raise NotImplementedError(
            "execution.precision = 'fp8' has kernels for Hopper GPUs (compute capability 9.0) and TPUs, and this GPU"
            f" ({device.device_kind}) has {capability}; use --config.execution.precision=bf16"
        )
    if config.execution.remat == "offload":
        check_host_memory(mesh, "execution.remat", "offload", "full")
    nodes, shared = axis_size(mesh, EXPERTS[:1]), axis_size(mesh, (CONTEXT,))
    return resolve(config, device.platform, axis_size(mesh, EXPERTS), nodes, shared)


def resolve_for_training(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """Return what `resolve_for` does, for train steps, which may keep an average of the weights in host memory.

    Raises:
        ValueError, NotImplementedError: as `resolve_for`.
        ValueError: the average is to lie in host memory, and there is none.
    """
    if config.optimizer.ema_memory == "host":
        check_host_memory(mesh, "optimizer.ema_memory", "host", "device")
    return resolve_for(config, mesh)


def resolve(config: Config, platform: str, expert_devices: int, nodes: int = 1, context: int = 1) -> Config:
    """Return `config` with every "auto" of `execution` replaced; each choice is logged with its reason.

    Args:
        config: any valid config.
        platform: `device.platform` of the mesh's devices: "cpu", "gpu" or "tpu".
        expert_devices: devices along the expert axes of the mesh.
        nodes: size of the mesh's slow axis, `node`, one of the expert axes.
        context: devices that share the tokens of a row.

    Raises:
        ValueError: `execution` asks for attention, an exchange or experts that do not fit the configuration.
        NotImplementedError: `execution` asks for attention that this platform does not have.
    """
    execution = config.execution
    attention, exchange, experts = execution.attention, execution.exchange, execution.experts
    if attention == "auto":
        attention, reason = _choose_attention(config, platform, context)
        logging.info("attention: %s (%s)", attention, reason)
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(attention, platform)
    if platform != needed:
        raise NotImplementedError(
            f"execution.attention = {attention!r} needs a {needed.upper()}, and this is a {platform.upper()}; use"
            " --config.execution.attention=auto"
        )
    if attention == "splash" and config.data.sequence_length % (SPLASH_BLOCK * context):
        raise ValueError(
            f"data.sequence_length = {config.data.sequence_length} must be a multiple of {SPLASH_BLOCK * context} for"
            " execution.attention = 'splash'; change it, or use --config.execution.attention=auto"
        )
    if attention == "cudnn" and context > 1:
        raise ValueError(
            f"execution.attention = 'cudnn' takes whole rows, and {context} devices share one (config.mesh.context);"
            " use 'auto' or 'xla'"
        )
    if attention == "cudnn" and (config.data.mask_documents or execution.precision == "fp32"):
        raise ValueError(
            "execution.attention = 'cudnn' needs precision 'bf16' or 'fp8', and data.mask_documents = False; use"
            " 'auto' or 'xla'"
        )
    if exchange == "auto":
        exchange = choose_exchange(expert_devices, nodes)
        logging.info("expert exchange: %s (%d devices in %d nodes hold experts)", exchange, expert_devices, nodes)
    if exchange == "local" and expert_devices > 1:
        raise ValueError(
            f"execution.exchange = 'local' needs every expert on every device, but {expert_devices} devices share"
            " them; use 'auto'"
        )
    if experts == "auto":
        experts, reason = _choose_experts(config, platform)
        logging.info("experts: %s (%s)", experts, reason)
    if experts == "grouped" and execution.precision == "bf16" and platform == "cpu":
        raise ValueError(
            "execution.experts = 'grouped' in BF16 has no kernel for a CPU, where its reference takes minutes a step;"
            " use 'auto' or 'blocks'"
        )
    return config.with_(execution={"attention": attention, "exchange": exchange, "experts": experts})


def choose_exchange(expert_devices: int, nodes: int) -> str:
    """Return what `execution.exchange` = "auto" means where so many devices, in so many nodes, share the experts."""
    if expert_devices == 1:
        return "local"
    return "two_hop" if 1 < nodes < expert_devices else "dense"


def _choose_attention(config: Config, platform: str, context: int) -> tuple[str, str]:
    if platform == "tpu" and config.data.sequence_length % (SPLASH_BLOCK * context):
        return "xla", f"splash attention takes sequences of a multiple of {SPLASH_BLOCK * context}"
    if platform == "tpu":
        return "splash", "the Pallas kernel for TPU"
    if platform != "gpu":
        return "xla", f"no flash attention for {platform}"
    if config.execution.precision == "fp32":
        return "xla", "cuDNN flash attention takes BF16, the precision is fp32"
    if context > 1:
        return "xla", f"cuDNN flash attention takes whole rows, and {context} devices share one"
    if config.data.mask_documents:
        return "xla", "cuDNN flash attention takes one segment per row, and data.mask_documents is on"
    return "cudnn", "cuDNN flash attention"


def _choose_experts(config: Config, platform: str) -> tuple[str, str]:
    if config.execution.precision == "fp8":
        return "grouped", "products in FP8 are grouped"
    if config.execution.precision == "fp32" or platform != "gpu" or not dispatch.on_hopper():
        return "blocks", "the grouped kernels are for BF16 on Hopper GPUs"
    if config.model.width % GROUP or config.model.expert_hidden % GROUP:
        return "blocks", f"the grouped kernels want widths that are multiples of {GROUP}"
    return "grouped", "the Pallas kernels for Hopper"
