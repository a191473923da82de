"""Runs of GRPO that a test kills: forked by a process that has imported everything, and started no device.

    python -m tests.support.grpo_runs <folder of the initial run>
    whole 0 0 0    starts the run in <folder>/whole with a staleness of 0; "started <its process id>" is answered, and
                   "ended <its status>"
    whole 0 4 0    the same, and in its rollout number 4, counted from its start, the sampler raises an error
    whole 0 0 2    it takes two updates and then waits to be killed

The sampler is an engine without a model, whose tokens depend on every bit of the weights (`WeighedBatch`); all else is
what `experiments.posttrain` runs.

A run appends to <folder>/<name>.trained a line for each update that it begins: its number, the version of the weights
that sampled, and a digest of each sample with its prompt. Of updates that were taken twice the later line counts.
"""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import jax

from deepseek_jax.inference.engine import Engine
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import grpo
from deepseek_jax.posttraining.policy_batches import PolicyBatches
from deepseek_jax.posttraining.settings import read
from deepseek_jax.training.fingerprint import fingerprints
from tests.posttraining.test_grpo import settings
from tests.support.failing_rewards import varied
from tests.support.fake_batch import FakeBatch, fake_weights

STEPS = 12


class WeighedBatch(FakeBatch):
    """A device side whose tokens follow from the weights."""

    def update_weights(self, weights):
        """Take a number that every bit of the weights changes."""
        super().update_weights(fake_weights(sum(fingerprints(dict(weights._asdict())).values()) % 997))


class Recorded(PolicyBatches):
    """Batches that leave a record."""

    record: Path
    fails_at = -1
    most = 0

    def next_batch(self, batch_size):
        """Return the next batch, and write what is in it."""
        Recorded.most -= 1
        if Recorded.most == -1:
            threading.Event().wait()
        batch = super().next_batch(batch_size)
        rows = zip(batch["tokens_BS"], batch["targets_BS"], batch["loss_weights_BS"] > 0, strict=True)
        digests = [hashlib.blake2b(a.tobytes() + b.tobytes() + c.tobytes()).hexdigest()[:16] for a, b, c in rows]
        version = self.rows[self.step]["rollout/version"]
        with self.record.open("a") as file:
            file.write(json.dumps([self.step, version, digests]) + "\n")
        return batch

    def _roll_out(self, *arguments):
        Recorded.fails_at -= 1
        if Recorded.fails_at == 0:
            raise RuntimeError("an error in the sampler")
        return super()._roll_out(*arguments)


def tiny(tree):
    """Return a configuration of one MoE layer: it compiles in a few seconds."""
    tree.model.update({"num_layers": 1, "num_dense_layers": 0, "num_mtp_layers": 0})
    tree.loss.mtp_weight = (("constant", 1.0, 0.0),)
    return tree


def train(folder: Path, name: str, staleness: int, fails_at: int, most: int) -> None:
    """Train in `folder`/`name` from its last checkpoint, a run of one prompt an update."""
    Recorded.record, Recorded.fails_at, Recorded.most = folder / f"{name}.trained", fails_at, most or STEPS + 1
    grpo.PolicyBatches = Recorded
    grpo.rewards_by_name = lambda names: dict.fromkeys(names, varied)
    grpo.open_engine = lambda config, grpo, problems, weights, tokenizer, *_: Engine(WeighedBatch(), tokenizer)
    options = {"staleness": staleness, "updates": 1, "steps": STEPS, "reference_every": 3}
    config, posttraining = read(tiny(settings(folder / "base", **options, training__keep_checkpoints=2)))
    grpo.train_grpo(config, posttraining, folder / name, make_mesh(config.mesh, jax.devices()[:1]))


def main() -> None:
    """Fork a run for each line."""
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        name, *numbers = line.split()
        process = os.fork()
        if not process:
            os.dup2(2, 1)
            status = 1
            try:
                train(folder, name, *map(int, numbers))
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ()), file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        print(f"started {process}", flush=True)
        print(f"ended {os.waitpid(process, 0)[1]}", flush=True)


if __name__ == "__main__":
    main()
