"""How long the ticks of a pipeline take: the table that the step runs, with the times of its stages.

All devices send to their neighbours after every tick, so a device begins a tick when these have ended the one before. A
W in another tick than its B makes the gradients between layers once more, which is a B more. With equal stages, and W
apart as long as W, this is `pipeline.simulation.run` with `in_step`. The head runs in the tick of the last stage's B.
A B apart from its W has nothing to do in the first stage, where no gradient of an input is needed.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.pipeline.program import Program


class Times(NamedTuple):
    """Seconds of a micro-batch by stage, each an array [stages].

    Attributes:
        forward, weights: of F and W.
        inputs: of B, without the head; a W apart from its B takes them, too.
        alone: of a B apart from its W.
        head: of the objective and its gradients, in the tick of B.
    """

    forward: np.ndarray
    inputs: np.ndarray
    weights: np.ndarray
    alone: np.ndarray
    head: np.ndarray


def cell_times(program: Program, of: Times) -> np.ndarray:
    """Return the times of all cells, [devices, ticks]."""
    joined = of.inputs + of.head, of.weights
    apart = of.alone + of.head, of.weights + of.inputs
    times = np.where(program.forward_stage >= 0, of.forward[program.forward_stage], 0.0)
    for stage, pending, together, alone in (
        (program.backward_stage, program.backward_pending, joined[0], apart[0]),
        (program.weight_stage, program.weight_pending, joined[1], apart[1]),
    ):
        times += np.where(stage >= 0, np.where(pending >= 0, alone[stage], together[stage]), 0.0)
    return times


def makespan(program: Program, times: np.ndarray) -> float:
    """Return the time of all ticks, where every device waits for both neighbours after each; times as `cell_times`."""
    free, ring = np.zeros(len(times)), program.table.placement.name == "interleaved"
    for now in times.T:
        beside = np.concatenate([free[-1:] * ring, free, free[:1] * ring])
        free = np.maximum(np.maximum(beside[:-2], beside[2:]), free) + now
    return float(free.max())


def idle_share(program: Program, times: np.ndarray) -> float:
    """Return the share of the ticks' time that devices wait, on average; times as `cell_times`."""
    return 1 - float(times.sum()) / (len(times) * makespan(program, times))


def of_equal_stages(program: Program) -> np.ndarray:
    """Return `cell_times` of equal stages, in which F, B and W take one each, and the head nothing."""
    one = np.ones(program.table.placement.num_stages)
    return cell_times(program, Times(one, one, one, one, 0 * one))
