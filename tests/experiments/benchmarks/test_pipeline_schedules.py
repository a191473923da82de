"""The table of `docs/pipeline.md` is what the command prints, and the drawing shows what is in the tables."""

import os
import subprocess
import sys
from pathlib import Path

from deepseek_jax.pipeline.drawing import draw
from deepseek_jax.pipeline.schedules import SCHEDULES, schedule
from deepseek_jax.pipeline.simulation import Durations

ROOT = Path(__file__).parents[3]


def test_the_table_in_the_docs_is_what_the_command_prints(tmp_path):
    drawing = tmp_path / "schedules.png"
    done = subprocess.run(  # not imported: a flag of another benchmark may have the same name
        [sys.executable, "-m", "experiments.benchmarks.pipeline_schedules", f"--drawing={drawing}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "docs" / "pipeline.md").read_text()
    assert drawing.stat().st_size > 0


def test_a_drawing_has_a_box_for_every_part_and_a_frame_for_every_pair():
    tables = [schedule(name, 2, 4) for name in SCHEDULES]
    panels = draw(tables, Durations(overlapped=2.5)).axes
    assert [panel.get_title(loc="left").partition(":")[0] for panel in panels] == list(SCHEDULES)
    for panel, table in zip(panels, tables, strict=True):
        cells = [cell for row in table.cells for cell in row if cell is not None]
        parts = sum(len(list(cell.parts())) for cell in cells)
        outlines = sum(len(patch.get_path().to_polygons()) for patch in panel.patches)
        assert outlines == parts + sum(cell.kind == "FBW" for cell in cells)
        assert len(panel.texts) == sum(1 + (cell.kind == "FBW") for cell in cells)
