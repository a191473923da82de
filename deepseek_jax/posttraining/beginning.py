"""How a stage begins: what it takes over from its weights (tokenizer, chat template), and whose its workdir is.

A template that writes the date has that of the run's first start for the whole run, else its ids would be others on the
next day, and the run could not continue.
"""

import datetime
import json
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.config import Config
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.jinja import TIME
from deepseek_jax.data.tokenizer import CONFIG_NAME, TOKENIZER_FILES, Tokenizer
from deepseek_jax.files import write_atomically
from deepseek_jax.huggingface.companions import CHAT_TEMPLATE
from deepseek_jax.inputs import read_text, shown
from deepseek_jax.posttraining.conversations import FOLDER, find_template
from deepseek_jax.posttraining.settings import Posttraining, check_claimed, claim
from deepseek_jax.training.adapters_file import claim_adapters
from deepseek_jax.training.continuation import check_one_step
from deepseek_jax.training.origin import find_origin, initial_tokenizer
from deepseek_jax.training.workdir import (
    HUGGINGFACE,
    TEMPLATE_DATE,
    check_workdir,
    claim_workdir,
    is_claimed,
    put_tokenizer,
    read_tokenizer,
)


def tokenizer_and_template(config: Config, name: str, workdir: Path) -> tuple[Tokenizer, ChatTemplate]:
    """Return those of the run, or of the weights that it begins with; the tokenizer is put into `workdir`.

    Args:
        config: of the run, with `training.initial_weights`.
        name: of the template, as `conversations.find_template` takes it.
        workdir: of the run.

    Raises:
        ValueError: the weights are not there, or there is no such template.
    """
    path, kept = workdir / TOKENIZER_FILES[0], workdir / HUGGINGFACE
    if is_claimed(workdir) and os.path.lexists(path):  # the origin may be gone
        return Tokenizer.load(path), dated(find_template(name, kept), workdir)
    origin = find_origin(config)
    assert origin is not None  # `settings.read` asks for one
    put_tokenizer(workdir, read_tokenizer(origin.folder) if origin.run else initial_tokenizer(config))
    folder = origin.folder / HUGGINGFACE if origin.run else origin.folder
    return Tokenizer.load(path), dated(find_template(name, folder if name == FOLDER else None), workdir)


def dated(template: ChatTemplate, workdir: Path) -> ChatTemplate:
    """Return the template with the date that it writes in the run of `workdir`; today's where there is no run yet.

    Raises:
        ValueError: the run's file of the date is damaged.
    """
    if not template.reads(TIME):
        return template
    path = workdir / TEMPLATE_DATE
    if is_claimed(workdir) and path.exists():
        text = read_text(path).strip()
        try:
            return template.at(datetime.datetime.fromisoformat(text))
        except ValueError as error:
            raise ValueError(
                f"{shown(str(path))} holds {shown(repr(text))} and no date; write the day of the run's first start into"
                " it, as 2026-01-31"
            ) from error
    now = datetime.datetime.now().isoformat(timespec="microseconds")
    if jax.process_count() > 1:  # midnight may lie between two of them
        now = bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(now.encode(), np.uint8))).decode()
    return template.at(datetime.datetime.fromisoformat(now))


def keep_template(workdir: Path, template: ChatTemplate) -> None:
    """Leave the template where chats and exports of the run look for it, with its special tokens' names and date."""
    if jax.process_index() == 0:
        folder = workdir / HUGGINGFACE
        folder.mkdir(exist_ok=True)
        names = json.loads((workdir / CONFIG_NAME).read_text("utf-8"))
        names.pop("chat_template", None)  # the file beside it has priority, and is the one that was trained with
        write_atomically(folder / CHAT_TEMPLATE, template.source)
        if template.moment is not None:
            write_atomically(workdir / TEMPLATE_DATE, template.moment.isoformat() + "\n")
        write_atomically(folder / CONFIG_NAME, json.dumps(names, ensure_ascii=False, indent=2))


def checked(config: Config, posttraining: Posttraining, workdir: Path) -> Config:
    """Return the configuration, which `workdir` may go on with.

    Raises:
        ValueError: the workdir belongs to another run.
    """
    check_claimed(workdir, posttraining)
    check_workdir(workdir, config)
    check_one_step(config)
    return config


def claim_run(
    workdir: Path, config: Config, posttraining: Posttraining, template: ChatTemplate, base: str = ""
) -> None:
    """Write into a workdir whose it is, the whole configuration last; `base`: fingerprint of what adapters are of."""
    keep_template(workdir, template)
    claim(workdir, posttraining)
    claim_adapters(workdir, posttraining.lora, base)
    claim_workdir(workdir, config)
