"""Memory of a device with sequences of 128K, shared or whole: `python -m experiments.benchmarks.long_context`.

Compiles the training step of one of V3's MoE layers, with embedding and head, ahead of time for TPUs that need not be
there: 128 v5p, eight of which share the experts. `configs/deepseek_v3_128k.py` says the rest, in BF16. Each line is a
number of devices that share a sequence (`mesh.context`); the devices of the others have sequences of their own.

The compiler is ended when it has assigned the buffers (`deepseek_jax.plan.assignment`): to make machine code took nine
tenths of its time. A record is written as soon as it is there.
"""

import importlib.metadata
from typing import Any

from absl import flags

from configs import deepseek_v3_128k
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.inputs import new_file
from deepseek_jax.plan.assignment import assign_step
from deepseek_jax.plan.chips import CHIPS, GIB, prepare
from deepseek_jax.plan.memory import StepMemory
from deepseek_jax.plan.run import signs_of_life
from experiments import command
from pallas_kernels.bench import records

CHIP, DEVICES, EXPERT = "v5p", 128, 8
CONTEXT = flags.DEFINE_list("context", ["1", "8", "16"], "How many devices share a sequence, one line each.")
REMAT = flags.DEFINE_enum("remat", "selective", ["none", "selective", "full"], "execution.remat.")
JSON = flags.DEFINE_string("json", None, "File for the records.")


def main(_) -> None:
    """Compile, print, write."""
    shared = [int(text) if text.isdecimal() else 0 for text in CONTEXT.value]
    if not all(count and DEVICES % count == 0 for count in shared):
        raise ValueError(f"--context={','.join(CONTEXT.value)} must be divisors of {DEVICES} devices, such as 1,8,16")
    target = new_file(JSON.value, "--json") if JSON.value else None
    prepare()
    device = f"{DEVICES} x {CHIP}, compiled by libtpu {importlib.metadata.version('libtpu')}"
    common = records.provenance("experiments.benchmarks.long_context", device)
    found = []
    for context in shared:
        config = layer(context)
        with signs_of_life(f"compiling for {context} devices a sequence", print):
            memory = assign_step(config, CHIPS[CHIP], DEVICES)
        found.append(record(config, memory) | common)
        print(found[-1]["shape"], f"{memory.total / GIB:.1f} GiB a device", "" if memory.fits else "(refused)")
        if target:
            records.write(target, found)


def layer(context: int) -> Config:
    """Return one MoE layer of V3 at 128K, one sequence for every group of devices that shares one."""
    rows = DEVICES // context
    return from_config_dict(deepseek_v3_128k.get_config()).with_(
        model={"num_layers": 1, "num_dense_layers": 0, "num_mtp_layers": 0},
        training={"micro_batch_size": rows, "batch_size": (("constant", 1.0, rows),)},
        mesh={"data": -1, "context": context, "node": 1, "expert": EXPERT},
        execution={"precision": "bf16", "remat": REMAT.value},
    )


def record(config: Config, memory: StepMemory) -> dict[str, Any]:
    """Return the record of one compiled step."""
    context = config.mesh.context
    shape = {"context": context, "sequence": config.data.sequence_length}
    shape["tokens a device"] = config.data.sequence_length // context
    parts = {"arguments": memory.arguments, "temporaries": memory.temporaries, "peak": memory.peak}
    return {
        "config": "one MoE layer of deepseek_v3_128k",
        "mode": f"training step, remat {config.execution.remat}",
        "precision": config.execution.precision,
        "shape": shape,
        "value": round(memory.total / GIB, 2),
        "unit": "GiB a device",
        "source": memory.source,
        "fits": memory.fits,
        "parts": {name: None if size is None else round(size / GIB, 2) for name, size in parts.items()},
        "seconds": None if memory.seconds is None else round(memory.seconds),
    }


if __name__ == "__main__":
    command.run(main)
