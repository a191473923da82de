"""`experiments/notebooks/quickstart.ipynb` runs from its first cell to its last, on a smaller model and less text."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "quickstart.ipynb"

SMALLER = """
WORKDIR = Path({workdir!r})
config_dict.data.sources = ({{"path": {corpus!r}, "weight": 1.0}},)
config_dict.data.tokenizer = "byte"
config_dict.data.sequence_length = 128
config_dict.data.heldout_fraction = 0.3
config_dict.model.update({{"vocab_size": 512, "width": 64, "num_layers": 2, "dense_hidden": 64, "expert_hidden": 32}})
config_dict.execution.update({{"expert_block": 16, "expert_wave": 8}})
config_dict.training.update({{"num_tokens": 8 * 8 * 128, "eval_batches": 2}})
"""


def output_text(notebook):
    """Return what the code cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.py").write_text(f"def f{i}(x):\n    return [x + {i}, 'text']\n\n" * 20)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    smaller = SMALLER.format(workdir=str(tmp_path / "run"), corpus=str(corpus))
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell(smaller))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert "bits per byte" in output_text(notebook) and "def " in output_text(notebook)
    images = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 3


def test_the_committed_notebook_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
