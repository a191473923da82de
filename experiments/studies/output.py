"""Where studies write what they find: `--folder`, one flag for all of them."""

from pathlib import Path

from absl import flags

FOLDER = flags.DEFINE_string(
    "folder", None, "Where drawing and records are written; by default the study's folder in experiments/results."
)


def folder(study: str) -> Path:
    """Return the folder of a study: the flag's, or the one of this name in `results`, below what the README's table
    holds.
    """
    return Path(FOLDER.value or Path(__file__).parents[1] / "results" / study)
