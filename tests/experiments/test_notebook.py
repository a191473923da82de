"""The notebooks run from their first cell to their last, and are committed with their outputs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOK = FOLDER / "quickstart.ipynb"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

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

# A coin says what is right, as so small a model answers nothing right.
SMALLER_R1 = """
WORKDIR = Path({workdir!r})
config_dict["model"].update({{"width": 32, "num_layers": 2, "num_heads": 2, "query_latent": 16, "kv_latent": 16}})
config_dict["model"].update({{"content_dim": 8, "rotary_dim": 4, "value_dim": 8, "dense_hidden": 32}})
config_dict["data"]["sequence_length"] = 192  # random bytes are three times as long when they are encoded again
config_dict["r1"].update({{"examples": 24, "hasty": 24}})
own = {{"rewards": {{"chance": 1.0}}, "accuracy": "chance", "num_problems": 20, "heldout": 4, "steps": 1, "rows": 8}}
sizes = {{"training.batch_size": (("constant", 1.0, 8),), "training.micro_batch_size": 8}}
smaller = {{"sft": {{"epochs": 16.0}}, "grpo": own | {{"group_size": 4}}, "samples": {{"prompts": 20, "samples": 4}}}}
config_dict["r1"]["stages"] = tuple(
    stage | {{"settings": stage["settings"] | smaller[stage["kind"]], "changes": stage["changes"] and sizes}}
    for stage in config_dict["r1"]["stages"]
)
"""


def run_smaller(path, smaller):
    """Run a notebook, with a cell behind its parameters if there is one; return it."""
    notebook = nbformat.read(path, as_version=4)
    if smaller:
        parameters = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell(smaller))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


def images_of(notebook):
    """Return the outputs of the code cells that are drawings."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]


SHORTER = {"serving": "config_dict.training.num_tokens = 4e4"}  # a tenth of the training, every cell


def output_text(notebook):
    """Return what the code cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_the_quickstart_runs_on_a_smaller_model_and_less_text(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.py").write_text(f"def f{i}(x):\n    return [x + {i}, 'text']\n\n" * 20)
    notebook = run_smaller(NOTEBOOK, SMALLER.format(workdir=str(tmp_path / "run"), corpus=str(corpus)))
    assert "bits per byte" in output_text(notebook) and "def " in output_text(notebook)
    assert len(images_of(notebook)) == 3


@pytest.mark.slow
def test_the_stages_of_r1_run_on_a_smaller_model_and_fewer_problems(tmp_path):
    notebook = run_smaller(FOLDER / "r1.ipynb", SMALLER_R1.format(workdir=str(tmp_path / "run")))
    text = output_text(notebook)
    names = "cold_start_random", "cold_start", "reasoning", "second_sft", "second_rl"
    assert all(f"\n{name}: " in f"\n{text}" and f"\n{name} " in text for name in names)
    assert ", 0 in both" in text and " different right answers\n" in text and len(images_of(notebook)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("quickstart", "r1")])
def test_the_notebook_runs(name):
    run_smaller(FOLDER / f"{name}.ipynb", SHORTER.get(name, ""))


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_sees_outputs_and_no_trace_of_the_machine(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    texts = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert not [root for root in ("/root", "/tmp", "/home", "/work") if root in texts]
    assert all(cell.execution_count is not None for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_install_stops(name):
    """`!git` and `%pip` go on after an error."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    install = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert install.count("check=True") == 2
    assert not [line for line in install.splitlines() if line.strip().startswith(("!", "%"))]
