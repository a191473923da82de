"""R1's stages from nothing: fine-tuning, reinforcement learning, rejection sampling, and both again.

DeepSeek-R1 (arXiv 2501.12948, section 2.3) trains in four steps: a cold start on few conversations, reasoning-oriented
reinforcement learning, fine-tuning on samples of the result of which only right ones are kept, and reinforcement
learning for all uses. Here each is a stage of a configuration (`posttraining.r1_settings`), and a folder of `workdir`:

    examples.jsonl        conversations of the task that show the way to an answer
    <stage>_random/       random weights, where a stage begins with them
    <stage>/              the run of a stage of any kind but "samples", as `experiments.posttrain` makes it
    <stage>.jsonl         the conversations of a stage of kind "samples"
    results/<stage>.json  held-out accuracy behind a stage, and three answers; a stage that has this is done

Differences from R1: the weights that all begins with are random, not pre-trained, so the second fine-tuning continues
the cold start instead of the base model; there is one task, so the last stage adds a reward for the form, not for
helpfulness and harmlessness, which need a reward model.

A killed stage continues where it stopped: runs behind their checkpoint, samples behind the last finished block of
prompts. Draws depend on the seed, the stage's name, the prompt and the place in its group alone, so the samples are the
same.
"""

import contextlib
import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from deepseek_jax.files import write_atomically
from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import STOP, Job
from deepseek_jax.inputs import read_json
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.accuracy import accuracy_line, accuracy_row
from deepseek_jax.posttraining.beginning import dated
from deepseek_jax.posttraining.conversations import find_template
from deepseek_jax.posttraining.distillation import train_distillation
from deepseek_jax.posttraining.grpo import open_engine, open_pool, train_grpo
from deepseek_jax.posttraining.grpo_settings import Grpo
from deepseek_jax.posttraining.problems import Problems, open_problems
from deepseek_jax.posttraining.r1_settings import EXAMPLES, RANDOM, RESULTS, Plan, Stage, base_of, samples_of
from deepseek_jax.posttraining.rewards.pool import RewardPool
from deepseek_jax.posttraining.rollouts import sample_groups
from deepseek_jax.posttraining.sft import train_sft
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.saved import stored_steps
from deepseek_jax.training.state import create_state
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import HUGGINGFACE, claim_workdir, read_tokenizer

SHOWN = 3  # answers of a result
BLOCK = 100  # prompts whose samples are kept at once
# What stands around digits in the conversations; without digits, of which each stays a token.
FRAME = "User:\n{} \n\nAssistant:\n<think></think><answer></answer>"
MOST_TOKENS = 1 << 16  # of a tokenizer that has far fewer


def run_stages(
    plan: Plan, workdir: Path, tell: Callable[[str], None], devices: Sequence[Any] | None = None
) -> signal.Signals | None:
    """Run every stage that is not done, to its end or until a signal, which is returned.

    Args:
        plan: of which `workdir` is (`r1_record.keep_plan`).
        workdir: of all stages; exists.
        tell: takes the result of each stage as text.
        devices: that the stages run on; all by default.

    Raises:
        ValueError, RewardError, NonFiniteError, SaveError, OSError: as the stages.
    """
    prepare(plan, workdir, devices)
    for stage in plan.stages:
        if stage.kind == "samples":
            keep_right_answers(plan, stage, workdir, tell, devices)
            continue
        if stage.initial == RANDOM:
            measure(plan, stage, workdir, base_of(stage), tell, devices)
        if not _result(workdir, stage.name).exists():
            drivers = {"sft": train_sft, "grpo": train_grpo, "distillation": train_distillation}
            config, posttraining = plan.settings(stage, workdir)
            mesh = make_mesh(config.mesh, devices)
            result = drivers[stage.kind](config, posttraining, workdir / stage.name, mesh)
            if result.interrupted_by is not None:
                return result.interrupted_by
            measure(plan, stage, workdir, stage.name, tell, devices)
    return None


def prepare(plan: Plan, workdir: Path, devices: Sequence[Any] | None = None) -> None:
    """Write the conversations of the task, and random weights for the stages that begin with them, where missing."""
    conversations, path = plan.conversations(), workdir / f"{EXAMPLES}.jsonl"
    if not path.exists():
        _write_lines(path, conversations)
    word = conversations[0]["messages"][0]["content"].split()[0]
    for stage in plan.stages:
        if stage.initial == RANDOM:
            save_random(plan.settings(stage, workdir)[0], workdir / base_of(stage), word, devices)


def save_random(config: Config, folder: Path, word: str, devices: Sequence[Any] | None = None) -> None:
    """Save random weights as a run's checkpoint of step 0, with a tokenizer of bytes and of the words of a task.

    config.json is written last: a start that was killed before is made up for.
    """
    if (folder / "config.json").exists():
        return
    folder.mkdir(exist_ok=True)
    config = config.with_(training={"initial_weights": ""})
    train_bpe([FRAME.format(word)] * 2, MOST_TOKENS).save(folder / TOKENIZER_FILES[0])
    if not stored_steps(folder):
        mesh = make_mesh(config.mesh, devices)
        with jax.set_mesh(mesh), contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
            start = Progress(step=0, tokens_seen=0, data=None)
            checkpoints.save(create_state(config), start, config, read_tokenizer(folder), mesh)
            checkpoints.wait()
    claim_workdir(folder, config)


def measure(
    plan: Plan,
    stage: Stage,
    workdir: Path,
    folder: str,
    tell: Callable[[str], None],
    devices: Sequence[Any] | None = None,
) -> None:
    """Answer the held-out problems with the weights in a folder; leave accuracy and some answers in its result.

    The problems, the reward and the longest answer are those of the plan's first stage of GRPO.
    """
    path = _result(workdir, folder)
    if path.exists():
        return
    grpo = plan.grpo(plan.measure, workdir)
    with open_sampler(plan, stage, workdir, folder, grpo, devices) as (engine, pool, problems, weights):
        row = accuracy_row(engine, pool, problems.heldout, grpo.accuracy, grpo.max_new_tokens, weights)
        shown = problems.heldout[:SHOWN]
        answers = engine.generate(
            [Job(prompt=p.ids, max_new_tokens=grpo.max_new_tokens, sampling=GREEDY) for p in shown]
        )
    texts = [(prompt.problem.name, answer.text) for prompt, answer in zip(shown, answers, strict=True)]
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(row | {"answers": texts}, indent=1) + "\n")
    tell(result_lines(folder, read_json(path)))


def result_lines(name: str, row: dict) -> str:
    """Return a result as lines for a person."""
    head = f"{name}: {accuracy_line(row)}"
    return "\n".join([head, *(f"  {question!r} -> {answer!r}" for question, answer in row["answers"])])


def keep_right_answers(
    plan: Plan,
    stage: Stage,
    workdir: Path,
    tell: Callable[[str], None],
    devices: Sequence[Any] | None = None,
) -> None:
    """Draw answers to training problems with the weights of `stage.initial`; keep the right ones, each once.

    Right is what `Grpo.accuracy` of that stage says, ends with EOS, and is not empty, which fine-tuning does not take.
    Blocks of prompts that are done are kept.

    Raises:
        ValueError: no answer was right.
    """
    path, settings = workdir / f"{stage.name}.jsonl", samples_of(stage)
    if path.exists():
        return
    origin = plan.named(stage.initial)
    grpo = plan.grpo(origin, workdir)
    blocks = {begin: workdir / stage.name / f"{begin:06d}.jsonl" for begin in range(0, settings.prompts, BLOCK)}
    with open_sampler(plan, origin, workdir, stage.initial, grpo, devices) as (engine, pool, problems, weights):
        engine.update_weights(weights)
        (workdir / stage.name).mkdir(exist_ok=True)
        for begin, block in blocks.items():
            if not block.exists():
                numbers = range(begin, min(begin + BLOCK, settings.prompts))
                seed = sampling_seed(plan, stage)
                _write_lines(block, _right_answers(engine, pool, problems, numbers, grpo, settings, seed))
    kept = [json.loads(line) for block in blocks.values() for line in block.read_text("utf-8").splitlines()]
    if not kept:
        raise ValueError(f"stage {stage.name!r}: none of the answers is right; train {stage.initial!r} for longer")
    _write_lines(path, kept)
    tell(f"{stage.name}: {len(kept):,} different right answers of {settings.prompts * settings.samples:,} kept")


def sampling_seed(plan: Plan, stage: Stage) -> int:
    """Return the seed of the draws of a stage of samples: of no other such stage, and not that of the rollouts."""
    text = f"{plan.shared['seed']}/{stage.name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _right_answers(engine, pool, problems, numbers, grpo, settings, seed: int) -> list[dict]:
    keyed = [(number, problems.train[number].ids) for number in numbers]
    drawn = sample_groups(engine, keyed, settings.samples, grpo.max_new_tokens, seed, settings.temperature)
    asked = [problems.train[sample.number].problem for sample in drawn]
    scores = pool.score(asked, [sample.text for sample in drawn])
    kept = {
        (problem.name, sample.text): problem.messages
        for problem, sample, score in zip(asked, drawn, scores, strict=True)
        if score.parts[grpo.accuracy] == 1.0 and sample.finish_reason == STOP and sample.text.strip()
    }
    return [{"messages": [*messages, {"role": "assistant", "content": text}]} for (_, text), messages in kept.items()]


@contextlib.contextmanager
def open_sampler(
    plan: Plan,
    stage: Stage,
    workdir: Path,
    folder: str,
    grpo: Grpo,
    devices: Sequence[Any] | None = None,
) -> Iterator[tuple[Engine, RewardPool, Problems, Weights]]:
    """Open an engine with the weights in a folder of a stage's model, with the problems and rewards of `grpo`."""
    config, posttraining = plan.settings(stage, workdir)
    own = posttraining.sft or posttraining.grpo or posttraining.distillation
    assert own is not None
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh), open_pool(grpo) as pool:
        tokenizer = Tokenizer.load(workdir / folder / TOKENIZER_FILES[0])
        template = dated(find_template(own.template, workdir / folder / HUGGINGFACE), workdir / folder)
        problems = open_problems(config, grpo, template, tokenizer)
        weights = restore_weights(config, workdir / folder, mesh)[0]
        with open_engine(config, grpo, problems, weights, tokenizer, mesh) as engine:
            yield engine, pool, problems, weights


def _result(workdir: Path, name: str) -> Path:
    return workdir / RESULTS / f"{name}.json"


def _write_lines(path: Path, records: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
