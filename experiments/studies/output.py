"""The folder that a study writes its records and its drawing to: the flag `--folder`."""

from pathlib import Path

from absl import flags

from deepseek_jax.inputs import new_folder

FOLDER = flags.DEFINE_string(
    "folder", None, "Folder for the drawing and the records; the study's folder in experiments/results by default."
)


def folder(study: str) -> Path:
    """Return the folder of a study: --folder, or the folder of its name in `experiments/results`.

    Raises:
        ValueError: it cannot be written.
    """
    return new_folder(FOLDER.value or str(Path(__file__).parents[1] / "results" / study), "--folder")
