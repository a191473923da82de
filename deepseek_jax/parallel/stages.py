"""Stages of a pipeline: which layers each has, which layers a device holds, and what cannot be a pipeline.

A stage is consecutive layers; the first has the embedding, too, and the last the final norm, MTP layers and head.
Layers are dealt as evenly as they divide, an MTP layer counts as one:

    4 layers, 1 MTP, 2 stages     embed 0 1 2     |  3 norm MTP head
    V3 on 16 stages               14 of 4 layers  |  2 of 3, of which MTP is one
"""

import functools
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import Config, Model
from deepseek_jax.pipeline.program import Program, compile_table
from deepseek_jax.pipeline.schedules import schedule
from deepseek_jax.pipeline.table import Placement

STACKS = ("dense_layers", "moe_layers")  # whose layers are dealt to stages; MTP layers are all in the last one


class Span(NamedTuple):
    """Consecutive layers of a stack."""

    first: int
    number: int


class Stage(NamedTuple):
    """A part of the model: embedding if it is the first, norm, MTP layers and head if it is the last."""

    dense_layers: Span
    moe_layers: Span
    is_first: bool
    is_last: bool

    @property
    def shape(self) -> "Stage":
        """What a program must know of a stage before it runs: all but where its layers begin."""
        return self._replace(dense_layers=Span(0, self.dense_layers.number), moe_layers=Span(0, self.moe_layers.number))


def split_layers(model: Model, num_stages: int) -> list[Stage]:
    """Deal the layers to stages in order, as evenly as they divide; MTP layers count as layers and are in the last.

    Where they do not divide, the first stages have one more: the last has the head.

    Raises:
        ValueError: fewer layers than stages, or so many MTP layers that the last stage has no room for them.
    """
    each, left = divmod(model.num_layers + model.num_mtp_layers, num_stages)
    counts = [each + (stage < left) for stage in range(num_stages)]
    counts[-1] -= model.num_mtp_layers
    if not each or counts[-1] < 0:
        raise ValueError(
            f"config.model has {model.num_layers} layers and {model.num_mtp_layers} MTP layers, too few for"
            f" {num_stages} stages of a pipeline; lower mesh.pipe, or use an execution.schedule with fewer stages"
        )
    starts = np.cumsum([0, *counts])
    dense = model.num_dense_layers

    def stage(i: int) -> Stage:
        first, end = int(starts[i]), int(starts[i + 1])
        of_dense = Span(min(first, dense), min(end, dense) - min(first, dense))
        of_moe = Span(max(first, dense) - dense, max(end, dense) - max(first, dense))
        return Stage(of_dense, of_moe, i == 0, i == num_stages - 1)

    return [stage(i) for i in range(num_stages)]


class Holding(NamedTuple):
    """What each device holds.

    Attributes:
        layers: per stack an array [devices, slots] of layers; a slot that is not used has layer 0.
        starts: per stack the slot of the first layer of each chunk, the same on all devices: a program knows where the
            weights of a chunk are before it runs, and takes them as they lie.
    """

    layers: dict[str, np.ndarray]
    starts: dict[str, list[int]]


def holding_of(placement: Placement, stages: list[Stage]) -> Holding:
    """Return the layers of every device in the order of its chunks, in as few slots as that order allows."""
    devices, chunks = range(placement.num_devices), range(placement.num_chunks)
    layers, starts = {}, {}
    for name in STACKS:
        spans = [[getattr(stages[placement.stage(d, c)], name) for c in chunks] for d in devices]
        ends = np.zeros(len(devices), np.int32)
        starts[name] = []
        for chunk in chunks:
            numbers = np.array([row[chunk].number for row in spans])
            start = int(ends[numbers > 0].max(initial=0))
            ends = np.where(numbers > 0, start + numbers, ends)
            starts[name].append(start)
        layers[name] = np.zeros((len(devices), ends.max(initial=0)), np.int32)
        for row, of_chunks in zip(layers[name], spans, strict=True):
            for start, span in zip(starts[name], of_chunks, strict=True):
                row[start : start + span.number] = range(span.first, span.first + span.number)
    return Holding(layers, starts)


@functools.lru_cache(maxsize=512)  # a search of plans asks for many
def program_of(name: str, num_devices: int, num_micro_batches: int) -> Program:
    """Return the program of a schedule."""
    return compile_table(schedule(name, num_devices, num_micro_batches))


def check_pipeline(config: Config, shape: dict[str, int]) -> None:
    """Refuse what a mesh of `shape` with several devices along `pipe` cannot run.

    Raises:
        ValueError: it names the value and the remedy.
    """
    num_devices, execution = shape.get("pipe", 1), config.execution
    if num_devices == 1:
        return
    check_beside_pipeline(config, shape)
    for _, _, sequences in config.training.batch_size:
        count = int(sequences) // config.training.micro_batch_size
        try:
            placement = program_of(execution.schedule, num_devices, count).table.placement
        except ValueError as error:
            raise ValueError(
                f"config.execution.schedule = {execution.schedule!r}, mesh.pipe = {num_devices}: {error}. A step has"
                f" training.batch_size / training.micro_batch_size = {int(sequences)} /"
                f" {config.training.micro_batch_size} = {count} micro-batches"
            ) from error
        split_layers(config.model, placement.num_stages)


def check_beside_pipeline(config: Config, shape: dict[str, int]) -> None:
    """Refuse what no pipeline can have beside it, whatever its schedule and number of stages.

    Raises:
        ValueError: it names the value and the remedy.
    """
    execution, here = config.execution, f"with mesh.pipe = {shape['pipe']}"
    if shape.get("context", 1) > 1:
        raise ValueError(f"config.mesh.context = {shape['context']} {here} is not built; set either to 1")
    if execution.interleave > 1:
        raise ValueError(
            f"config.execution.interleave = {execution.interleave} {here}: a pipeline overlaps whole micro-batches; use"
            " execution.interleave = 1, and execution.schedule = 'dualpipev' for pairs that overlap"
        )
    if execution.remat == "offload":
        raise ValueError(
            f"config.execution.remat = 'offload' {here} does not exist: its stages keep what the backward pass needs in"
            " slots of their own; use --config.execution.remat=full"
        )
    if execution.gather == "kept":
        raise ValueError(
            f"config.execution.gather = 'kept' {here} would keep a stage's weights for each micro-batch on its way;"
            " use gather = 'layer', or 'step', which gathers once for all"
        )
    if config.loss.batch_balance_weight and config.model.num_moe_layers:
        raise ValueError(
            f"config.loss.batch_balance_weight = {config.loss.batch_balance_weight} {here} is not built: its counts are"
            " those of a whole batch, before the first backward pass; set it to 0 and use sequence_balance_weight"
        )


def refuse_pipeline(shape: dict[str, int], what: str) -> None:
    """Refuse a mesh of several stages, for work that runs all layers on every device."""
    if shape.get("pipe", 1) > 1:
        raise ValueError(
            f"config.mesh.pipe = {shape['pipe']}: {what} has all layers on every device; use --config.mesh.pipe=1"
            " there. Checkpoints of a pipeline are read on any mesh"
        )
