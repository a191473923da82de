"""The table of `docs/pipeline.md` is what the command prints, and the drawing shows what is in the tables."""

from pathlib import Path

from deepseek_jax.pipeline.drawing import draw
from deepseek_jax.pipeline.schedules import SCHEDULES, schedule
from deepseek_jax.pipeline.simulation import Durations
from experiments.benchmarks.pipeline_schedules import markdown

ROOT = Path(__file__).parents[3]
OVERLAPPED = Durations(overlapped=2.5)


def test_the_table_in_the_docs_is_made_from_the_schedules():
    tables = [schedule(name, 8, 32) for name in SCHEDULES]
    assert markdown(tables, OVERLAPPED) in (ROOT / "docs" / "pipeline.md").read_text()


def test_a_drawing_has_a_box_for_every_part_and_a_frame_for_every_pair():
    tables = [schedule(name, 2, 4) for name in SCHEDULES]
    panels = draw(tables, OVERLAPPED).axes
    assert [panel.get_title(loc="left").partition(":")[0] for panel in panels] == list(SCHEDULES)
    for panel, table in zip(panels, tables, strict=True):
        cells = [cell for row in table.cells for cell in row if cell is not None]
        parts = sum(len(list(cell.parts())) for cell in cells)
        assert len(panel.patches) == parts + sum(cell.kind == "FBW" for cell in cells)
        assert all(box.get_width() > 0 for box in panel.patches)
