"""The tokenizer of a run, kept in its workdir.

A start that fails, or is interrupted, may leave its tokenizer.json behind before the workdir belongs to a
configuration. So what made it is written beside it, into `RECORD`: the settings, and the names, sizes and times of the
files that a BPE was trained on. The next start uses the tokenizer if it would make the same one, and else makes its
own. A tokenizer.json without a record was put there by someone and is used as it is (a start of training refuses it,
unless a run owns the workdir: `training.workdir`). So is that of a workdir which belongs to a run (it has a
config.json), whose configuration is checked elsewhere.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.data.bpe import byte_tokenizer, train_bpe
from deepseek_jax.data.sources import source_key
from deepseek_jax.data.tokenizer import CONFIG_NAME, Tokenizer
from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import local_path, read_bytes, read_json, shown

RECORD = "tokenizer_made_from.json"

log = logging.getLogger(__name__)


def make_tokenizer(config: Config, workdir: str | os.PathLike, documents: Iterable[str]) -> Tokenizer:
    """Return the run's tokenizer: `tokenizer.json` of `workdir`, or else the one of `data.tokenizer`, saved there.

    Args:
        config: its `data.tokenizer` is "bpe" (trained up to `model.vocab_size` entries), "byte", or the path of a
            tokenizer.json.
        workdir: the run's folder.
        documents: texts of the train split, read only if a BPE has to be trained.

    Raises:
        ValueError: the tokenizer cannot be read, needs more ids than `model.vocab_size`, or is not the one that its
            record in `workdir` speaks of.
    """
    cached = Path(workdir) / "tokenizer.json"
    kept = os.path.lexists(cached) and not _is_left_over(config, cached)
    if kept:
        tokenizer, origin = Tokenizer.load(cached), shown(str(cached))
    elif config.data.tokenizer == "bpe":
        tokenizer, origin = train_bpe(documents, config.model.vocab_size), "the trained tokenizer"
    elif config.data.tokenizer == "byte":
        tokenizer, origin = byte_tokenizer(), "the byte tokenizer"
    else:
        path = local_path(config.data.tokenizer, "data.tokenizer")
        tokenizer, origin = Tokenizer.load(path), shown(str(path))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{origin} needs {tokenizer.vocab_size} ids and model.vocab_size = {config.model.vocab_size};"
            f" set model.vocab_size to at least {tokenizer.vocab_size}, or use another data.tokenizer"
        )
    if kept and not cached.with_name(CONFIG_NAME).exists():
        tokenizer.save_names(cached)
    if not kept:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # In this order, so that whatever a kill leaves, a tokenizer.json of ours lies beside its record.
        cached.unlink(missing_ok=True)
        record = {"tokenizer": tokenizer.content_digest, "made_from": _origin(config)}
        write_atomically(cached.with_name(RECORD), json.dumps(record, indent=1))
        tokenizer.save(cached)
    return tokenizer


def _is_left_over(config: Config, cached: Path) -> bool:
    """Return whether a start with another configuration or corpus left this tokenizer.json, and no run owns it.

    Raises:
        ValueError: it cannot be told, because the record speaks of another tokenizer.json.
    """
    record_path = cached.with_name(RECORD)
    if not os.path.lexists(record_path) or (cached.parent / "config.json").exists():
        return False
    record = read_json(record_path)
    try:
        digest = hashlib.sha256(read_bytes(cached)).hexdigest()
    except ValueError:
        if os.path.lexists(cached):
            raise
        return True  # another process of this start has just removed it
    if record.get("tokenizer") != digest:
        raise ValueError(
            f"{shown(str(cached))} is not the tokenizer that {RECORD} beside it speaks of; remove {RECORD} to use the"
            " tokenizer, or both to have it made again"
        )
    if record.get("made_from") == _origin(config):
        return False
    log.warning("%s was left by a start with another configuration or corpus and is made again", cached)
    return True


def _origin(config: Config) -> dict[str, Any]:
    """Return what a tokenizer depends on, as JSON."""
    origin: dict[str, Any] = {"data.tokenizer": config.data.tokenizer}
    if config.data.tokenizer == "bpe":
        files = hashlib.sha256()
        for source in config.data.sources:
            files.update(json.dumps(source_key(source)).encode())
        data = config.data
        origin |= {
            "model.vocab_size": config.model.vocab_size,
            "weights": [source.weight for source in data.sources],
            "data": [data.text_field, data.on_error, data.heldout_fraction],
            "files": files.hexdigest(),
        }
    elif config.data.tokenizer != "byte":
        path = local_path(config.data.tokenizer, "data.tokenizer")
        origin["file"] = hashlib.sha256(read_bytes(path)).hexdigest() if path.exists() else None
    return origin
