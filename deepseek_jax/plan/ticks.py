"""How long the ticks of a pipeline take: the table that the step runs, with the times of its stages.

All devices send to their neighbours after every tick, so a device begins a tick when these have ended the one before. A
W in another tick than its B makes the gradients between layers once more, which is a B more. With equal stages, and W
apart as long as W, this is `pipeline.simulation.run` with `in_step`.
"""

import numpy as np

from deepseek_jax.pipeline.program import Program


def cell_times(program: Program, forward: np.ndarray, inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the times of all cells [devices, ticks], from those of a micro-batch's F, B and W by stage."""
    times = np.zeros(program.kind.shape)
    for stage, of in (
        (program.forward_stage, forward),
        (program.backward_stage, inputs),
        (program.weight_stage, weights),
    ):
        times += np.where(stage >= 0, of[stage], 0.0)
    return times + np.where(program.weight_pending >= 0, inputs[program.weight_stage], 0.0)


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
    """Return `cell_times` of equal stages, in which F, B and W take one each."""
    one = np.ones(program.table.placement.num_stages)
    return cell_times(program, one, one, one)
