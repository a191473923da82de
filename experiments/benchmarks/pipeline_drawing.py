"""Draw what the devices of a pipeline do: `python -m experiments.benchmarks.pipeline_drawing --trace=FILE
--drawing=pipeline.png`.

A lane per device, from a profiler's trace of one step (`experiments/benchmarks/pipeline_timeline`). It also prints how
long each device computes between the first tick and the last one, and what share of that it idles. --json writes what
it draws, and --spans=FILE draws it again.
"""

from absl import flags

from deepseek_jax.inputs import local_path, new_file
from experiments import command
from experiments.benchmarks import pipeline_timeline

TRACE = flags.DEFINE_string("trace", None, "The .xplane.pb file of one step.")
SPANS = flags.DEFINE_string("spans", None, "In place of a trace: a file that --json wrote.")
DRAWING = flags.DEFINE_string("drawing", None, "Write the drawing to this file, such as pipeline.png.", required=True)
JSON = flags.DEFINE_string("json", None, "Write the spans to this file.")
TITLE = flags.DEFINE_string("title", "", "Title of the drawing.")


def main(_) -> None:
    """Read, print, draw."""
    trace, kept = command.path_of(TRACE, local_path), command.path_of(SPANS, local_path)
    drawing, out = command.path_of(DRAWING, new_file), command.path_of(JSON, new_file)
    assert drawing  # it is required
    if trace and not kept:
        ticks, devices = pipeline_timeline.from_trace(trace)
    elif kept and not trace:
        ticks, devices = pipeline_timeline.from_json(kept)
    else:
        raise ValueError("--trace and --spans: name one of them, the trace of a step or what --json wrote")
    for device, spans in devices.items():
        print(pipeline_timeline.describe(device, pipeline_timeline.use_of(spans, ticks)))
    if out:
        out.write_text(pipeline_timeline.as_json(ticks, devices))
    pipeline_timeline.draw(ticks, devices, TITLE.value).savefig(drawing, dpi=110)


if __name__ == "__main__":
    command.run(main)
