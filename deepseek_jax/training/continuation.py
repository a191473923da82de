"""What may change when a run continues, and what the change does.

A run may continue with another configuration if what it computes from the same state and data is the same: on another
mesh, executed in another way, logged and saved at other intervals. Three more keys may change:

    training.num_tokens      a longer run, or a shorter one that still holds the tokens seen. Schedules are fractions of
                             it, so they stretch: at the same token they have other values than before
    paths in data.sources,   a corpus or a tokenizer that moved. Once there is a checkpoint, its position in the data
    a path data.tokenizer    knows the content, and the loader refuses another one

Devices may come and go: the batch of a step stays. A micro-batch of `training.micro_batch_size` sequences is divided
over them, so on fewer devices each has more of it, and `say_division` names the value with which memory stays.

Everything else belongs to another run: it may begin with this one's weights (`training.initial_weights`).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.inputs import shown
from deepseek_jax.parallel.mesh import AnyMesh, check_fit
from deepseek_jax.parameters import PIPE, TOKENS
from deepseek_jax.training.optimizer import batch_size, rates

LENGTH = "training.num_tokens"
FREE_SECTIONS = ("mesh.", "execution.")
FREE_KEYS = {
    "data.prefetch",
    LENGTH,
    "training.micro_batch_size",
    "optimizer.ema_memory",
    "training.log_every",
    "training.eval_every",
    "training.eval_batches",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.max_skipped_steps",
    "training.initial_weights",  # a folder may move, and a run with a checkpoint does not read it again
}
BOUND_KEYS = {"execution.precision"}  # inside a free section, yet part of what is computed
MADE_TOKENIZERS = ("bpe", "byte")  # every other data.tokenizer is a path
ABSENT = "(absent)"
MOST_LINES = 20  # of differences in a message
REMEDY = "give its values, or another --workdir (which may begin with these weights: training.initial_weights)"


def check_continues(
    stored: Any, config: Config, folder: Path, where: str, trained: bool, say: bool = True, remedy: str = REMEDY
) -> None:
    """Refuse a configuration that another run has.

    Args:
        stored: the run's configuration as JSON.
        config: to continue with.
        folder: that `stored` is in, for messages.
        where: a word for it.
        trained: whether the run has a checkpoint.
        say: warn of each difference that is allowed.
        remedy: what the command at hand can do.

    Raises:
        ValueError: something differs that belongs to a run; the message shows each difference.
    """
    old, new = _leaves(_current(stored)), _leaves(_json(to_dict(config)))
    changed = {
        key: (old.get(key, ABSENT), new.get(key, ABSENT))
        for key in (*new, *(key for key in old if key not in new))
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    }
    bound = {key: values for key, values in changed.items() if not _is_free(key, *values, trained)}
    differences = bound or changed
    lines = [f"  {key}: {_shown(was)} in {where}, {_shown(now)} given" for key, (was, now) in differences.items()]
    if bound:
        raise ValueError(
            f"{folder} holds a run with another config; {remedy}:\n"
            + "\n".join([*lines[:MOST_LINES], *([f"  and {len(lines) - MOST_LINES} more"] * (len(lines) > MOST_LINES))])
        )
    if say:
        for key, line in zip(differences, lines, strict=True):
            if not trained or key != LENGTH:  # which `check_length` tells
                logging.warning("the config has changed:%s", line[1:])


def check_length(stored: Any, config: Config, step: int, tokens_seen: int) -> None:
    """Say what another `training.num_tokens` does to the schedules; refuse one that the run is already beyond.

    Args:
        stored: the configuration of the checkpoint that the run continues from, as JSON.
        config: to continue with.
        step: optimizer steps taken.
        tokens_seen: tokens seen.

    Raises:
        ValueError: the run has seen more tokens.
    """
    before, after = float(stored["training"]["num_tokens"]), config.training.num_tokens
    if before == after:
        return
    if after < tokens_seen:
        raise ValueError(
            f"training.num_tokens = {after:,.0f} is less than the {tokens_seen:,} tokens that the run has seen; add"
            f" --config.{LENGTH}={before:.0f}, which its checkpoint has, or go back: remove the checkpoints beyond it"
        )
    old = config.with_(training={"num_tokens": before})
    names = ("optimizer.learning_rate", "loss.mtp_weight", "optimizer.bias_update_rate", "batch size")
    values = [(*rates(each, step, tokens_seen), batch_size(each, tokens_seen)) for each in (old, config)]
    logging.warning(
        "training.num_tokens goes from %s to %s. Schedules are fractions of it: at token %s %s",
        *(f"{before:,.0f}", f"{after:,.0f}", f"{tokens_seen:,}"),
        ", ".join(
            f"{name} stays {was:.6g}" if was == now else f"{name} goes from {was:.6g} to {now:.6g}"
            for name, was, now in zip(names, *values, strict=True)
        ),
    )


def say_division(record: dict[str, Any], config: Config, mesh: AnyMesh) -> None:
    """Say what another number of devices does to each device's part of a micro-batch, and to evaluations.

    The batch of a step is the same on any mesh. A device's memory is that of its part of a micro-batch, if the pipeline
    is as long as before; evaluations read `training.eval_batches` micro-batches.

    Args:
        record: of the checkpoint that the run continues from.
        config: to continue with.
        mesh: to continue on.
    """
    stored, training = record["config"]["training"], config.training
    before = record["environment"]["mesh"]
    old, new = stored["micro_batch_size"], training.micro_batch_size
    read, flags = old * stored["eval_batches"], {}
    stages_then, stages_now = (shape.get(PIPE, 1) for shape in (before, mesh.shape))
    if stages_then != stages_now:
        logging.warning(
            "the pipeline has mesh.pipe = %d, before %d: the memory of a device cannot be compared",
            *(stages_now, stages_then),
        )
    else:
        flags = _say_memory(old, _token_devices(before), read, config, mesh)
    unchanged = training.eval_batches == stored["eval_batches"]  # another number is meant to read other sequences
    if new * training.eval_batches != read and unchanged and "eval_batches" not in flags:
        remedy = f"; --config.training.eval_batches={read // new} keeps them comparable"
        logging.warning(
            "evaluations read %d sequences, before %d%s",
            *(new * training.eval_batches, read, "" if flags or read % new else remedy),
        )


def _say_memory(old: int, then: int, read: int, config: Config, mesh: AnyMesh) -> dict[str, int]:
    """Say that each device's part of a micro-batch is larger.

    Args:
        old: the micro-batch of the checkpoint.
        then: devices that shared its tokens.
        read: sequences of its evaluations.
        config: to continue with.
        mesh: to continue on.

    Returns:
        The keys of `training` that were named, with the values that keep the part as it was: none if there are none.
    """
    new, now = config.training.micro_batch_size, _token_devices(mesh.shape)
    if old * now >= new * then:
        return {}
    smaller, left = divmod(old * now, then)
    flags = {}
    if not left and _fits(config, smaller, mesh):
        flags = {"micro_batch_size": smaller} | ({} if read % smaller else {"eval_batches": read // smaller})
    named = " ".join(f"--config.training.{name}={value}" for name, value in flags.items())
    logging.warning(
        "%d devices share a micro-batch of %d sequences, before %d one of %d: activations take %.3g times the"
        " memory of a device%s",
        *(now, new, then, old, new * then / (old * now)),
        f"; {named} keeps them as they were, and the step's batch too" if named else "",
    )
    return flags


def _fits(config: Config, size: int, mesh: AnyMesh) -> bool:
    """Return whether a run takes micro-batches of `size` sequences: they divide its batches, and the mesh them."""
    if any(int(sequences) % size for *_, sequences in config.training.batch_size):
        return False
    try:
        check_fit(config.with_(training={"micro_batch_size": size}), mesh)
    except ValueError:
        return False
    return True


def _token_devices(shape: Mapping[str, int]) -> int:
    """Return among how many devices the tokens of a micro-batch are divided."""
    return math.prod(shape.get(axis, 1) for axis in TOKENS)


def check_one_step(config: Config) -> None:
    """Refuse a run that is shorter than its first step."""
    wanted, step = config.training.num_tokens, batch_size(config, 0) * config.data.sequence_length
    if wanted < step:
        raise ValueError(
            f"config.training.num_tokens = {wanted:g} is less than the {step:,} tokens of one step (batch_size x"
            " sequence_length); raise it"
        )


def _is_free(key: str, old: Any, new: Any, trained: bool) -> bool:
    if key == "data.sources":
        return trained and _without_paths(old) == _without_paths(new)
    if key == "data.tokenizer":
        return trained and not {old, new} & {*MADE_TOKENIZERS, ABSENT}
    return key not in BOUND_KEYS and (key in FREE_KEYS or key.startswith(FREE_SECTIONS))


def _shown(value: Any) -> str:
    return ABSENT if value == ABSENT else shown(repr(value))


def _without_paths(sources: Any) -> Any:
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return sources
    return [{key: value for key, value in source.items() if key != "path"} for source in sources]


def _current(stored: Any) -> Any:
    """Return a stored configuration in today's form if it can be read so; else as it is."""
    try:
        return _json(to_dict(from_config_dict(stored)))
    except ValueError:
        return stored


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{"model.width": 7168, ...}` of nested dicts."""
    leaves = {}
    for key, value in tree.items() if isinstance(tree, dict) else [("", tree)]:
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
