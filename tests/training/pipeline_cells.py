"""What runs together in a pipeline: the fewest steps in which every pair of features meets, and the table of pairs.

`PYTHONPATH=. python -m tests.training.pipeline_cells` writes the table into docs/pipeline.md. A pair is `=` if one of
the runs of `tests.training.test_pipeline` has both, and refused if a mesh with `pipe` refuses it. Each schedule meets
each precision, so there are at least 18 runs. These 18 have every pair that is not refused: those in FP32 have experts,
MTP, packed documents, four micro-batches and four devices in each of two stages; of the others most are dense.
"""

import itertools
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.pipeline.schedules import SCHEDULES
from tests.support import small
from tests.training import test_equal_steps as equal

DOCS = Path(__file__).parents[2] / "docs" / "pipeline.md"
BEGIN, END = "<!-- written by tests.training.pipeline_cells -->\n", "<!-- end -->\n"

# A pair of these is in one of the cells below or is refused by a rule: `pairs` says which.
FEATURES = {
    "data": {"mesh": {"data": 2}},
    "expert": {"mesh": {"expert": 2}},
    "node": {"mesh": {"node": 2}},
    "context": {"mesh": {"context": 2}},
    "MTP": {"model": {"num_mtp_layers": 1, "num_layers": 3}},
    "packing": {"data": {"mask_documents": True}},
    "BF16": {"execution": {"precision": "bf16"}},
    "FP8": {"execution": {"precision": "fp8"}},
    "selective": {"execution": {"remat": "selective"}},
    "step": {"execution": {"gather": "step"}},
    "1f1b": {"execution": {"schedule": "1f1b"}},
    "gpipe": {"execution": {"schedule": "gpipe"}},
    "interleaved": {"execution": {"schedule": "interleaved"}, "model": {"num_layers": 4}},
    "zb1p": {"execution": {"schedule": "zb1p"}},
    "dualpipe": {"execution": {"schedule": "dualpipe"}},
    "dualpipev": {"execution": {"schedule": "dualpipev"}, "model": {"num_layers": 4}},
    "interleave": {"execution": {"interleave": 2}},
    "batch-wise": {"loss": {"batch_balance_weight": 0.1}},
}
CHOICES = "schedule", "precision"  # keys that two features may set to different values

DATA_EXPERT, NODE_EXPERT, DATA_NODE = (2, 1, 2), (1, 2, 2), (2, 2, 1)  # data, node, expert beside two stages
ALONE, DATA, NODE, EXPERT = (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)
# Most layers compile fast if they are dense, and FP8 takes the longest. DualPipeV needs four layers.
RICH = {"num_layers": 3, "num_dense_layers": 1, "num_mtp_layers": 1}
DENSE = {"num_layers": 4, "num_dense_layers": 4, "num_mtp_layers": 0}
# A route that rounding flips moves the gradients of experts by some percent, so in BF16 and in FP8 every token takes
# every expert.
EVERY = {"num_experts": 4, "experts_per_token": 4, "num_groups": 1, "num_kept_groups": 1}
SHORT = EVERY | {"num_layers": 1, "num_dense_layers": 0, "num_mtp_layers": 1}
NONE, SELECTIVE, FULL, STEP = {}, {"remat": "selective"}, {"remat": "full"}, {"gather": "step"}
# Precision, schedule, mesh, model, execution.
ROWS = (
    ("fp32", "1f1b", DATA_EXPERT, RICH, SELECTIVE),
    ("fp32", "gpipe", NODE_EXPERT, RICH, STEP),
    ("fp32", "interleaved", DATA_NODE, RICH, STEP),
    ("fp32", "zb1p", DATA_EXPERT, RICH, SELECTIVE),
    ("fp32", "dualpipe", NODE_EXPERT, RICH, SELECTIVE),
    ("fp32", "dualpipev", DATA_NODE, RICH, STEP),
    ("bf16", "1f1b", NODE, DENSE, STEP),
    ("bf16", "gpipe", DATA, DENSE, SELECTIVE),
    ("bf16", "interleaved", EXPERT, DENSE, SELECTIVE),
    ("bf16", "zb1p", NODE, DENSE, STEP),
    ("bf16", "dualpipe", DATA, DENSE, STEP),
    ("bf16", "dualpipev", DATA_EXPERT, RICH | EVERY, SELECTIVE | STEP),
    ("fp8", "1f1b", EXPERT, SHORT, SELECTIVE | STEP),
    ("fp8", "gpipe", NODE, DENSE, FULL),
    ("fp8", "interleaved", ALONE, DENSE, NONE),
    ("fp8", "zb1p", DATA, DENSE, NONE),
    ("fp8", "dualpipe", ALONE, DENSE, NONE),
    ("fp8", "dualpipev", ALONE, DENSE, NONE),
)


def config(pipe, sizes=(1, 1, 1), num_cuts=1, model=(), execution=(), **changes):
    """A model as narrow as that of `test_equal_steps`, which does not depend on `pipe`, `sizes` and `num_cuts`."""
    fp8 = dict(execution).get("precision") == "fp8"
    cfg = small.config(sizes, fp8)
    narrow = {} if fp8 else {"width": 32, "vocab_size": equal.VOCAB}
    return cfg.with_(
        model=narrow | dict(model),
        data={} if fp8 else {"sequence_length": equal.LENGTH},
        loss={"sequence_balance_weight": 0.01},
        training={"micro_batch_size": equal.ROWS // num_cuts},
        mesh={"pipe": pipe},
        execution={"remat": "none"} | dict(execution),
        **changes,
    )


CELLS = {
    f"{precision} {schedule}": config(2, sizes, 4, model, execution | {"precision": precision, "schedule": schedule})
    for precision, schedule, sizes, model, execution in ROWS
}


def features_of(cfg):
    """What a configuration has of FEATURES."""
    execution = cfg.execution
    found = {axis for axis in ("data", "node", "expert", "context") if getattr(cfg.mesh, axis) > 1}
    found |= {"MTP"} if cfg.model.num_mtp_layers else set()
    found |= {"packing"} if cfg.data.mask_documents else set()
    found |= {execution.precision.upper()} - {"FP32"}
    found |= {"selective"} & {execution.remat} | {"step"} & {execution.gather}
    return found | {execution.schedule}


def pairs():
    """Return {(feature, feature): "equal", "refused: ...", "either", or "" for what no cell has together}."""
    table = {}
    tested = [features_of(cfg) for cfg in CELLS.values()]
    for both in itertools.combinations_with_replacement(FEATURES, 2):
        chosen = [[FEATURES[feature].get("execution", {}).get(key) for feature in both] for key in CHOICES]
        if any(one and other and one != other for one, other in chosen):
            table[both] = "either"
            continue
        changes = {}
        for feature in both:
            for section, values in FEATURES[feature].items():
                changes[section] = changes.get(section, {}) | values
        cfg = small.config((1, 1, 1), fp8="FP8" in both).with_(mesh={"pipe": 2}, training={"micro_batch_size": 4})
        cfg = cfg.with_(**changes)
        sizes = [getattr(cfg.mesh, axis) for axis in ("pipe", "data", "context", "node", "expert")]
        try:
            check_fit(cfg, make_mesh(cfg.mesh, jax.devices()[: np.prod(sizes)]))
        except ValueError as error:
            table[both] = f"refused: {error}"
        else:
            table[both] = "equal" if any(set(both) <= features for features in tested) else ""
    return table


def table_of_pairs():
    """Markdown: `=`, `-` for one or the other, or the number of the message that refuses it; then the messages."""
    table = pairs()
    names = list(FEATURES)
    messages = list(dict.fromkeys(text for text in table.values() if text.startswith("refused")))
    signs = {"equal": "=", "either": "-", "": ""} | {text: f"r{i + 1}" for i, text in enumerate(messages)}
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for i, row in enumerate(names):
        cells = [signs[table[names[j], row]] if j <= i else "" for j in range(len(names))]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", *(f"- r{i + 1}: {text}" for i, text in enumerate(messages))]
    return "\n".join(lines) + "\n"


def main():
    """Write the table into the page."""
    before, begin, rest = DOCS.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{DOCS} has no place for the table"
    DOCS.write_text(before + BEGIN + "\n" + table_of_pairs() + "\n" + END + after)


assert {row[1] for row in ROWS} == set(SCHEDULES)

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
