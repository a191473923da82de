"""Predicted step times beside published ones, and beside our own on one and two H200s.

`python -m experiments.benchmarks.plan_calibration` prints the table.

Each row has what its source states of the run: devices, batch, layout, precision, what is computed twice, what travels
beside computation. The rates are those of every plan (`rates.py`): **no constant belongs to a row**. A row that is off
by more than 15% says why.

Published systems are not ours: other kernels, other recomputation, another exchange. What a source does not state is in
the row's `note`. All of them balance routing by force or train on random tokens; ours route by a fresh router.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.config import Config, Model
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.counts import state_of
from deepseek_jax.plan.meshes import require_fit
from deepseek_jax.plan.stages import time_of
from deepseek_jax.plan.timing import DEEPEP, IN, NCCL, OUT, TORUS, Layout, StepTime, Transport, step_time
from deepseek_jax.plan.traffic import copies_of, fresh_routes, spread
from pallas_kernels import GROUP

Load = Callable[[str], Config]  # a config of configs/, by name
CLOSE = 0.15
BF16, FP32 = 2, 4
NUM_TOKENS = 1024  # that a fresh router routes
TPU_REASON = (
    "no TPU is measured: a TPU is assumed to reach a Hopper card's shares of its peak, and MaxText does not; its FP8"
    " run takes only 17% less than its BF16 run"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose step time is known.

    Attributes:
        name: of the row.
        chip, chips: what it ran on; a TPU chip may be two devices.
        seconds: of a step, published or measured.
        batch: sequences of a step.
        config: name of the config whose model it trains.
        precision: of the products.
        mtp: whether MTP layers ran.
        source: where the figure and the layout are stated.
        stages, schedule, chunks, tensor: of the pipeline.
        expert_devices: that share the experts of a layer; 1: each has all, weights are gathered (FSDP).
        nodes: over which these devices lie.
        remat: "none", "selective" or "full".
        transport: of rows.
        hides: what travels behind computation.
        fp8_rows: whether rows travel out in E4M3.
        sequences: of a micro-batch on a device; FSDP takes all at once.
        square: share of its square that attention computes.
        note: what is assumed.
        reason: why it is off, if it is.
    """

    name: str
    chip: str
    chips: int
    seconds: float
    batch: int
    precision: str
    source: str
    config: str = "deepseek_v3"
    mtp: bool = True
    stages: int = 1
    schedule: str = "none"
    chunks: int = 1
    tensor: int = 1
    expert_devices: int = 1
    nodes: int = 1
    remat: str = "selective"
    transport: Transport = NCCL
    hides: tuple[str, ...] = ()
    fp8_rows: bool = False
    sequences: int = 1
    square: float = 0.5
    note: str = ""
    reason: str = ""

    @property
    def devices(self) -> int:
        """Return the number of JAX devices."""
        return self.chips * CHIPS[self.chip].devices


class Own(NamedTuple):
    """A step of ours that was measured on H200s: the median over all records of its layout in `record`, a file of
    experiments/results.
    """

    name: str
    record: str
    seconds: float
    config: str
    batch: int  # sequences of a step
    mesh: dict[str, int]
    execution: dict[str, str]
    note: str = ""
    reason: str = ""
    micro_batches: int = 1
    layers: int = 0  # 0: the config's


BRIDGE = "NVIDIA-NeMo/Megatron-Bridge, performance summary; scripts/performance/configs/deepseek"
RECIPES = "AI-Hypercomputer/tpu-recipes, training/ironwood"
RUNS = (
    Run(
        "2,048 H800", "h800", 2048, 19.926, 15360, "fp8", "arXiv 2505.09343, table 4; arXiv 2412.19437, section 3",
        stages=16, schedule="dualpipe", expert_devices=64, nodes=8, transport=DEEPEP, hides=("exchange",),
        fp8_rows=True,
        note="a sequence in a micro-batch, as in the public profile",
        reason="their own public profile of 4 layers takes 129 ms, which our kernels would do in some 110: those of"
        " early 2025 were slower; and the first and last stage, with the heads, are not equal to the others",
    ),
    Run(
        "1,024 H100", "h100", 1024, 25.26, 8192, "fp8", BRIDGE,
        stages=8, schedule="interleaved", chunks=4, tensor=2, expert_devices=64, nodes=8, transport=DEEPEP,
        hides=("weights",),
        reason="what Megatron does beside is not in the model: its permutations, router and launches",
        note="FP8 by tensor; rows in BF16 through HybridEP, whose rate is taken as DeepEP's; dense FFN recomputed too",
    ),
    Run(
        "256 GB300", "gb300", 256, 10.42, 4096, "fp8", BRIDGE,
        stages=2, schedule="interleaved", chunks=8, expert_devices=32, nodes=1, transport=DEEPEP, hides=("weights",),
        sequences=2,
        note="MXFP8; HybridEP's share of NVLink is taken as DeepEP's",
    ),
    Run(
        "128 TPU7x, FP8", "tpu7x", 128, 22.47, 2048, "fp8", RECIPES, mtp=False, remat="full", transport=TORUS,
        hides=("weights",), square=0.75, note="FSDP; attention in blocks of 2,048", reason=TPU_REASON,
    ),
    Run(
        "128 TPU7x, BF16", "tpu7x", 128, 27.02, 2048, "bf16", RECIPES, mtp=False, remat="full", transport=TORUS,
        hides=("weights",), square=0.75, note="FSDP; attention in blocks of 2,048", reason=TPU_REASON,
    ),
    Run(
        "512 v5p", "v5p", 512, 90.668, 6144, "bf16", "AI-Hypercomputer/tpu-recipes, training/v5p", mtp=False,
        remat="full", transport=TORUS, hides=("weights",), note="FSDP over all devices; recomputation assumed full",
        reason=TPU_REASON,
    ),
)  # fmt: skip


TWO_CARDS = (
    "one card alone comes out 7% too short already; of FSDP, NCCL's kernels slow the products beside them"
    " (experiments/log.md), which is not in the model"
)
ONE_CARD = {"data": 1, "node": 1, "expert": 1}
OWN = (
    Own("1 H200, `v3_5b`", "exchange/v3_5b_h200.json", 0.397, "v3_5b", 8, ONE_CARD, {"precision": "fp8"}),
    Own("1 H200, `v3_5b`", "v3_5b_h200_bf16.json", 0.489, "v3_5b", 8, ONE_CARD, {"precision": "bf16"}),
    Own(
        "2 H200, `v3_5b`, experts shared", "exchange/v3_5b_2xh200.json", 0.4335, "v3_5b", 16,
        ONE_CARD | {"expert": 2}, {"precision": "fp8", "gather": "step"},
        note="eight records, 0.424 to 0.438 s",
        reason=TWO_CARDS,
    ),
    Own(
        "2 H200, `v3_5b`, FSDP by layer", "exchange/v3_5b_2xh200.json", 0.440, "v3_5b", 16,
        ONE_CARD | {"data": 2}, {"precision": "fp8", "gather": "layer"},
        note="four records, 0.434 to 0.492 s",
        reason=TWO_CARDS,
    ),
    Own(
        "2 H200, `v3_5b`, FSDP by step", "exchange/v3_5b_2xh200.json", 0.481, "v3_5b", 16,
        ONE_CARD | {"data": 2}, {"precision": "fp8", "gather": "step"},
        note="four records, 0.465 to 0.483 s",
        reason=TWO_CARDS,
    ),
    Own(
        "2 H200, `moonlight_16b`, experts shared", "exchange/moonlight_16b_2xh200.json", 1.277, "moonlight_16b", 16,
        ONE_CARD | {"expert": 2}, {"precision": "fp8", "remat": "full"},
    ),
    Own(
        "2 H200, `moonlight_16b`, experts shared", "exchange/moonlight_16b_2xh200.json", 1.585, "moonlight_16b", 16,
        ONE_CARD | {"expert": 2}, {"precision": "bf16", "remat": "full"},
    ),
)  # fmt: skip

# Steps of several micro-batches: `v3_5b` with 4 layers, by schedule (none: one card) and precision. The seconds of a
# step, and those of a traced one in which neither kernels nor transfers run, of two cards on average: both are records.
SCHEDULES = "pipeline/schedules_v3_5b_2xh200.json"
SHORT_STEPS = {
    "": {"bf16": (0.2208, 0.019), "fp8": (0.1992, 0.013)},
    "gpipe": {"bf16": (0.1691, 0.008), "fp8": (0.1631, 0.014)},
    "interleaved": {"bf16": (0.1917, 0.012), "fp8": (0.1879, 0.014)},
    "zb1p": {"bf16": (0.2033, 0.009), "fp8": (0.1907, 0.014)},
    "dualpipev": {"bf16": (0.1660, 0.014), "fp8": (0.1676, 0.023)},
}
OWN += tuple(
    Own(
        f"2 H200, `v3_5b`, {schedule}" if schedule else "1 H200, `v3_5b`", SCHEDULES, seconds, "v3_5b", 8,
        ONE_CARD | ({"pipe": 2} if schedule else {}),
        {"precision": precision} | ({"schedule": schedule} if schedule else {}),
        note=f"{1e3 * pauses:.0f} ms of pauses",
        micro_batches=8, layers=4,
    )
    for schedule, of in SHORT_STEPS.items() for precision, (seconds, pauses) in of.items()
)  # fmt: skip


def predict_own(own: Own, load: Load) -> StepTime:
    """Return the predicted step of one of ours."""
    training = {
        "batch_size": (("constant", 1.0, own.batch),),
        "micro_batch_size": own.batch // own.micro_batches,
    }
    config = load(own.config).with_(mesh=own.mesh, execution=own.execution, training=training)
    if own.layers:
        config = config.with_(model={"num_layers": own.layers})
    fit = require_fit(config, math.prod(own.mesh.values()))
    return time_of(fit.config, fit.mesh, state_of(config), CHIPS["h200"])


def predict(run: Run, load: Load) -> StepTime:
    """Return the predicted step of a run."""
    config = load(run.config).with_(execution={"precision": run.precision})
    if not run.mtp:
        config = config.with_(model={"num_mtp_layers": 0})
    return step_time(config, layout_of_run(run, config), CHIPS[run.chip])


def layout_of_run(run: Run, config: Config) -> Layout:
    """Return the layout of a published run."""
    model, length = config.model, config.data.sequence_length
    ranks = run.devices // (run.stages * run.tensor)  # that have micro-batches of their own
    sequences = run.batch // ranks
    experts = 3 * model.width * model.expert_hidden * model.num_experts * (model.num_moe_layers + model.num_mtp_layers)
    other = _parameters(config) - experts
    fsdp = run.expert_devices == 1
    micro_batches = 1 if fsdp else sequences // run.sequences
    tokens = sequences // micro_batches * length
    held = (experts / run.expert_devices + other / run.tensor) / run.stages
    if fsdp:  # weights forward and backward in BF16 (FP8 gathers them as they are stored), gradients once in BF16
        sent = {IN: (2 + 1) * BF16 * held, OUT: 0.0}
    else:  # gradients in FP32 and new weights in BF16, between replicas
        replicas = ranks / run.expert_devices
        of_experts = experts / run.expert_devices * (1 - 1 / replicas)
        size = (FP32 + BF16) * (of_experts + other / run.tensor * (1 - 1 / ranks)) / run.stages
        sent = {IN: 0.0, OUT: size} if run.devices > CHIPS[run.chip].node else {IN: size, OUT: 0.0}
    layers = (model.num_layers + model.num_mtp_layers) / run.stages
    # products that are divided: sequences are gathered and split again twice a layer, forward and backward
    split = sequences * layers * 8 * length * model.width * BF16 * (1 - 1 / run.tensor)
    return Layout(
        tokens, micro_batches, model.num_experts / run.expert_devices, _parameters(config) / run.devices,
        _exchange(run, config, sequences), sent, run.remat, run.transport, run.stages, run.schedule, run.chunks,
        run.tensor, run.hides, 1.0, split, run.square,
    )  # fmt: skip


def _exchange(run: Run, config: Config, sequences: int) -> dict[str, float]:
    """Return the bytes of all exchanges of a step: one copy per node, and per device inside nodes."""
    model = config.model
    if run.expert_devices == 1:
        return {IN: 0.0, OUT: 0.0}
    layers = (model.num_moe_layers + model.num_mtp_layers) / run.stages
    row = model.width * (1 + FP32 / GROUP) if run.fp8_rows else model.width * BF16
    each = layers * sequences * config.data.sequence_length / run.tensor * 2 * (row + model.width * BF16)
    sizes = {"node": run.nodes, "expert": run.expert_devices // run.nodes}
    exchange = "two_hop" if run.nodes > 1 else "dense"
    copies = copies_of(*spread(_routes(model), model.num_experts, sizes), sizes, exchange)
    return {IN: each * copies.expert, OUT: each * copies.node}


@functools.cache
def _routes(model: Model) -> np.ndarray:
    return fresh_routes(model, NUM_TOKENS)


@functools.cache
def _parameters(config: Config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state_of(config)["params"]))
