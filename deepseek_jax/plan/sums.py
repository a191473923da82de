"""What a step does with weights beside multiplying them: bytes of memory that each micro-batch reads and writes again.

    gradients   a micro-batch makes FP32 gradients of all weights of a device. Those of stacked layers are written over
                zeros, and added to the sum: zeros written; sum and gradient read, sum written. The sum of several
                micro-batches begins with zeros (`training.micro_batches`). In a pipeline gradients are added to the
                device's sums where they lie, from the first micro-batch on (`training.stage_work`)
    casts       BF16 copies are made of FP32 weights: once a step with `execution.gather` = "step", else by each pass of
                a micro-batch over a layer. FP8 copies are made once a step (`parallel.weights`)

Not counted, as no record has it yet: with `gather` = "step" the experts' products add to the sum themselves
(`parallel.gradient_sums`), which reads it and no more, and layers that are not scanned have no zeros of their own.

With few tokens in a micro-batch this is a large part of a step: a parameter costs 16 bytes a micro-batch, whatever its
tokens.
"""

from deepseek_jax.config import Config

ZEROS, ADDED = 1, 3  # times that the FP32 bytes of gradients pass through memory


def gradient_traffic(gradients: float, micro_batches: int) -> float:
    """Return the bytes of a step without a pipeline, of a device with so many bytes of FP32 gradients."""
    if micro_batches == 1:
        return gradients * ZEROS
    return gradients * (ZEROS * (1 + micro_batches) + ADDED * micro_batches)


def cast_traffic(config: Config, stored: float, passes: int) -> float:
    """Return the bytes that `passes` casts move of weights of which a device stores so many FP32 bytes."""
    element = {"fp8": 1, "bf16": 2}.get(config.execution.precision)
    return 0.0 if element is None else passes * stored * (4 + element) / 4


def casts_once(config: Config) -> bool:
    """Return whether weights are cast once a step, not by each pass over a layer."""
    return config.execution.precision == "fp8" or config.execution.gather == "step"
