"""Two processes of four devices do as one of eight: each trains on its own rows, and together they write one export."""

import numpy as np
import pytest

from deepseek_jax.training.metrics import KEYS, read_rows
from tests.training.runs import finish, free_port, start, write_corpus

STEPS = 12


def command(corpus, workdir, *options):
    size = f"--config.training.num_tokens={STEPS * 8 * 32}"
    mesh = ["--config.mesh.data=2", "--config.mesh.expert=4"]
    return [
        "-m",
        "experiments.train",
        f"--config=tests/training/nano.py:{corpus}",
        f"--workdir={workdir}",
        size,
        *mesh,
        *options,
    ]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Most of its time process 1 compiles, for which process 0 waits in Gloo: JAX's cache serves process 0 only."""
    corpus = write_corpus(tmp_path / "corpus")
    one, two, logs = tmp_path / "one", tmp_path / "two", [tmp_path / name for name in ("log", "log0", "log1")]
    finish(start(command(corpus, one, "--cpu_devices=8"), logs[0]), logs[0])

    together = ["--cpu_devices=4", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    processes = [start(command(corpus, two, *together, f"--process_id={i}"), logs[1 + i]) for i in range(2)]
    for process, log in zip(processes, logs[1:], strict=True):
        finish(process, log)

    yardsticks = [(key, 1) for key in KEYS if key.startswith("yardstick/")]
    for key, count in (("train/loss", STEPS), ("optimizer/grad_norm", STEPS), ("eval/bits_per_byte", 2), *yardsticks):
        of_one, of_two = ([row[key] for row in read_rows(workdir) if key in row] for workdir in (one, two))
        assert len(of_one) == count
        # sums over processes add in another order: 4e-7 was seen
        np.testing.assert_allclose(of_two, of_one, rtol=5e-6, err_msg=key)
    assert (two / "checkpoints" / str(STEPS)).is_dir()
    assert "held-out bits per byte, after" in logs[1].read_text()
    assert "held-out bits per byte" not in logs[2].read_text()


@pytest.mark.slow
def test_two_processes_export_what_one_does(tmp_path):
    """FP32 masters that neither process has whole, in more files than processes; one file is already there."""
    corpus = write_corpus(tmp_path / "corpus")
    workdir, one, two = tmp_path / "run", tmp_path / "one", tmp_path / "two"
    steps = f"--config.training.num_tokens={2 * 8 * 32}"
    finish(start([*command(corpus, workdir, steps), "--cpu_devices=8"], tmp_path / "log"), tmp_path / "log")
    export = ["-m", "experiments.convert_hf", "export", f"--workdir={workdir}", "--shard_gigabytes=0.00001"]
    finish(start([*export, f"--hf={one}", "--cpu_devices=8"], tmp_path / "log"), tmp_path / "log")
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) > 4

    def export_together() -> list[str]:
        together = [f"--hf={two}", "--cpu_devices=4", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        logs = [tmp_path / f"log{i}" for i in range(2)]
        for process, log in zip(
            [start([*export, *together, f"--process_id={i}"], logs[i]) for i in range(2)], logs, strict=True
        ):
            finish(process, log)
        return [log.read_text() for log in logs]

    said = export_together()
    assert "step 2 of" in said[0] and "step 2 of" not in said[1]
    contents = {path.name: path.read_bytes() for path in one.iterdir()}
    assert {path.name: path.read_bytes() for path in two.iterdir()} == contents
    kept, lost = two / files[0], two / files[2]
    before = kept.stat().st_mtime_ns
    lost.unlink()
    export_together()
    assert {path.name: path.read_bytes() for path in two.iterdir()} == contents
    assert kept.stat().st_mtime_ns == before
