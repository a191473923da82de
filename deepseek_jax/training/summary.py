"""What a run is, as lines for a person: said before anything is compiled.

All of it is computed from shapes, the configuration and the offsets of the documents; no array is made.
"""

import math
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.token_cache import Corpus, Documents
from deepseek_jax.inputs import shown
from deepseek_jax.parallel.mesh import environment
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.parameters import PARAMETERS, leaf_name
from deepseek_jax.training.checkpoint import Progress

MOST_SOURCES = 8  # with a line of their own


def run_lines(config: Config, mesh: jax.sharding.Mesh, params: Any, corpus: Corpus, progress: Progress) -> list[str]:
    """Return the description of a run: model, data, length, devices, programs, and where it starts.

    Args:
        config: the run's configuration.
        mesh: the mesh that it trains on.
        params: its parameters, or their shapes.
        corpus: its tokenised corpus.
        progress: where the run starts.
    """
    rows = [
        ("model", model_line(config, params)),
        *[("data" if i == 0 else "", line) for i, line in enumerate(data_lines(config, corpus))],
        ("length", length_line(config)),
        ("rates", rates_line(config)),
        ("devices", devices_line(mesh)),
        ("programs", programs_line(config, mesh)),
    ]
    return [f"{config.name}:", *(f"  {name:<10}{text}" for name, text in rows), position_line(config, progress)]


def model_line(config: Config, params: Any) -> str:
    """Return the number of parameters, and how many of them a token meets in the main model."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    model = config.model
    mtp = f" and {model.num_mtp_layers} for MTP" if model.num_mtp_layers else ""
    return (
        f"{short(total)} parameters, {short(active_parameters(config, params))} active per token; {model.num_layers}"
        f" layers{mtp}, {model.num_experts} experts of which {model.experts_per_token} per token"
    )


def active_parameters(config: Config, params: Any) -> int:
    """Return how many parameters of the main model one token meets: all but the experts that are not chosen for it."""
    model = config.model
    main = {name: part for name, part in params.items() if name != "mtp_layers"}
    return sum(
        leaf.size * model.experts_per_token // model.num_experts
        if PARAMETERS[leaf_name(path)].per_expert
        else leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(main)
    )


def data_lines(config: Config, corpus: Corpus) -> list[str]:
    """Return a line per source: documents, tokens, bytes, epochs that the run takes, and what is held out."""
    sources = config.data.sources
    weights = sum(source.weight for source in sources)
    lines = []
    for source, train, heldout in list(zip(sources, corpus.train, corpus.heldout, strict=True))[:MOST_SOURCES]:
        trained = config.training.num_tokens * source.weight / weights
        tokens = train.num_tokens + 2 * len(train)  # BOS and EOS
        share = f" ({source.weight / weights:.3g} of the tokens)" if len(sources) > 1 else ""
        epochs = f"{trained / tokens:.2g} epochs" if tokens else "nothing to train on"
        lines.append(f"{shown(source.path)}{share}: {_sizes(train)}, {epochs}; held out {_share(heldout, train)}")
    if len(sources) > MOST_SOURCES:
        lines.append(f"and {len(sources) - MOST_SOURCES} more sources")
    return lines


def _sizes(documents: Documents) -> str:
    num_bytes = int(documents.num_bytes.sum()) if len(documents) else 0
    count = f"{len(documents):,} document{'' if len(documents) == 1 else 's'}"
    return f"{count}, {short(documents.num_tokens)} tokens, {short(num_bytes)}B"


def _share(heldout: Documents, train: Documents) -> str:
    total = heldout.num_tokens + train.num_tokens
    return f"{heldout.num_tokens / total if total else 0.0:.2%}: {_sizes(heldout)}"


def length_line(config: Config) -> str:
    """Return steps, tokens, and the sizes of a batch."""
    sizes = [int(size) for _, _, size in config.training.batch_size]
    batch = f"{sizes[0]}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    tokens, length = short(config.training.num_tokens), config.data.sequence_length
    return f"{num_steps(config):,} steps of {batch} sequences of {length:,} tokens: {tokens} tokens"


def rates_line(config: Config) -> str:
    """Return the learning rate: its largest value, its last, and the steps of its warm-up."""
    optimizer = config.optimizer
    values = [value * optimizer.learning_rate_factor for _, _, value in optimizer.learning_rate]
    warmup = f", {optimizer.warmup_steps:,} steps of warm-up" if optimizer.warmup_steps else ""
    if optimizer.warmup_steps > num_steps(config):
        warmup += ", more than the run has, so the rate stays below: lower optimizer.warmup_steps"
    return f"learning rate up to {max(values):.3g}, {values[-1]:.3g} at the end{warmup}"


def num_steps(config: Config) -> int:
    """Return the optimizer steps of a run. A step takes the size that holds at its first token."""
    steps = seen = 0
    for _, until, size in config.training.batch_size:
        tokens = int(size) * config.data.sequence_length
        more = max(0, math.ceil((until * config.training.num_tokens - seen) / tokens))
        steps, seen = steps + more, seen + more * tokens
    return steps


def devices_line(mesh: jax.sharding.Mesh) -> str:
    """Return number and kind of the devices, the axes of the mesh, and the processes."""
    here = environment(mesh)
    cores = f" ({here['cores']} cores)" if here["platform"] == "cpu" else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f", {here['processes']} processes" if here["processes"] > 1 else ""
    return f"{mesh.size} x {here['device_kind']}{cores}{f'; mesh {axes}' if axes else ''}{processes}"


def programs_line(config: Config, mesh: jax.sharding.Mesh) -> str:
    """Return the precision and what is computed by which program; each "auto" says what it became."""
    given, resolved = config.execution, resolve_for(config, mesh).execution
    names = ("attention", "experts", "exchange")
    choices = [
        f"{name} {getattr(resolved, name)}{' (auto)' if getattr(given, name) == 'auto' else ''}" for name in names
    ]
    return ", ".join([f"precision {given.precision}", *choices])


def position_line(config: Config, progress: Progress) -> str:
    """Return where the run starts."""
    total = num_steps(config)
    if progress.tokens_seen >= config.training.num_tokens:
        return f"all {progress.step:,} steps are done"
    if progress.step:
        return f"continues after step {progress.step:,} of {total:,}"
    origin = config.training.initial_weights
    return f"starts: step 1 of {total:,}" + (f", with the weights of {shown(origin)}" if origin else "")


def short(number: float) -> str:
    """Return a count with three digits and a letter: 671B, 9.84M, 512."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"
