"""The files beside the weights of a checkpoint: tokenizer, chat template, configs, and the programs that they name.

An import copies them into `workdir/huggingface`, and an export writes them again as they are, except for a config.json
that no longer holds (`config_writer`). A run that began without a checkpoint has only its tokenizer, and a chat
template if it was fine-tuned on conversations. Its export gets a generation_config.json, and a tokenizer that begins
every text with BOS, as every document did in training: programs that call `tokenizer(text)` add what the post-processor
of tokenizer.json says, and nothing else. Our own `encode` never adds BOS by itself, so that its ids are the same with
such a file.

A link in a downloaded folder could lead to any file of this machine, and an export is made to be shared. So a link is
followed only to a file of the same name, or into the `blobs` of the hub's cache; and a copy is readable to no more
people than the file.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import processors

from deepseek_jax.config import Config
from deepseek_jax.data import tiktoken
from deepseek_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from deepseek_jax.files import write_atomically
from deepseek_jax.huggingface.config_writer import TokenIds, rewrite, still_holds, write_model
from deepseek_jax.inputs import read_json, read_text, shown

CONFIG = "config.json"  # written last, which marks a folder complete
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
NAMES = (GENERATION_CONFIG, CHAT_TEMPLATE, "special_tokens_map.json", tiktoken.FILE, *TOKENIZER_FILES, CONFIG)
# In config.json and tokenizer_config.json: {"AutoModel": "modeling_x.Model"}; "owner/name--module.Class" is elsewhere.
PROGRAM = re.compile(r"([A-Za-z_]\w*)\.\w+", re.ASCII)


class Companion(NamedTuple):
    """A file beside the weights: its text, with its own line ends, and its permissions."""

    text: str
    mode: int = 0o666


def read_tokenizer(folder: Path, vocab_size: int) -> dict[str, str]:
    """Return the texts of a checkpoint's tokenizer.json and tokenizer_config.json by name.

    The former is made from `tiktoken.model` where only that is there.

    Raises:
        ValueError: the folder or a file is missing or damaged, or there are more ids than `vocab_size`.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {shown(str(folder))}; name the folder of a checkpoint")
    missing = [name for name in TOKENIZER_FILES if not os.path.lexists(folder / name)]
    if missing == ["tokenizer.json"] and os.path.lexists(folder / tiktoken.FILE):
        texts = {"tokenizer.json": tiktoken.convert(folder)}
    elif missing:
        raise ValueError(
            f"{shown(str(folder))} lacks {missing}; a run needs its tokenizer: put these files there (transformers'"
            " save_pretrained writes them)"
        )
    else:
        texts = {"tokenizer.json": _read(folder / "tokenizer.json").text}
    texts["tokenizer_config.json"] = _read(folder / "tokenizer_config.json").text
    origin = folder / "tokenizer.json"
    tokenizer = Tokenizer.parse(texts["tokenizer.json"], read_json(folder / "tokenizer_config.json"), origin)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{shown(str(origin))} has ids up to {tokenizer.vocab_size - 1}, and the model's vocab_size is"
            f" {vocab_size}; put the tokenizer there that belongs to the weights"
        )
    return texts


def read(folder: Path) -> dict[str, Companion]:
    """Return the files beside a checkpoint's weights by name, those that are there.

    Raises:
        ValueError: one is not a readable text, not JSON where its name says so, or a link that leads elsewhere.
    """
    found = {name: _read(folder / name) for name in NAMES if os.path.lexists(folder / name)}
    modules: set[str] = set()
    for name in (CONFIG, "tokenizer_config.json"):
        if name in found:
            modules |= _programs(read_json(folder / name).get("auto_map"))
    for name in sorted(f"{module}.py" for module in modules):
        if os.path.lexists(folder / name):
            found[name] = _read(folder / name)
    for name in found:
        if name.endswith(".json"):
            read_json(folder / name)
    return found


def export(imported: Path, run_tokenizer: dict[str, str], config: Config, fp8: bool) -> dict[str, Companion]:
    """Return the files that an export holds beside its weights, config.json last.

    Args:
        imported: the folder into which an import copied a checkpoint's files; need not exist.
        run_tokenizer: the run's own tokenizer files, for a run without an import.
        config: of the run.
        fp8: whether the weights are stored in FP8.

    Raises:
        ValueError: a file is damaged, or the model has no config.json.
    """
    found = read(imported) if os.path.isdir(imported) else {}
    texts = {name: found[name].text if name in found else text for name, text in run_tokenizer.items()}
    settings = json.loads(texts["tokenizer_config.json"])
    tokenizer = Tokenizer.parse(texts["tokenizer.json"], settings, imported / "tokenizer.json")
    tokens = TokenIds(tokenizer.bos, tokenizer.eos, tokenizer.pad)
    length = config.data.sequence_length
    if CONFIG in found:
        hf = json.loads(found[CONFIG].text)
        if still_holds(hf, config.model, fp8):
            return {name: found[name] for name in sorted(found, key=CONFIG.__eq__)}
        written = rewrite(hf, config.model, fp8, tokens, length)
    else:
        found = {name: found[name] for name in (CHAT_TEMPLATE,) if name in found}
        found |= {name: Companion(text) for name, text in texts.items()}
        found["tokenizer.json"] = Companion(begin_with_bos(texts["tokenizer.json"], tokenizer))
        ids = {f"{name}_token_id": token_id for name, token_id in tokens._asdict().items()}
        found[GENERATION_CONFIG] = Companion(_json(ids))
        written = write_model(config.model, fp8, tokens, length)
    mode = found.pop(CONFIG, Companion("")).mode
    return found | {CONFIG: Companion(_json(written), mode)}


def write(folder: Path, files: dict[str, Companion]) -> None:
    """Write files one after another, each completely or not at all."""
    for name, file in files.items():
        write_atomically(folder / name, file.text, file.mode)


def begin_with_bos(text: str, tokenizer: Tokenizer) -> str:
    """Return the text of a tokenizer.json with a post-processor that puts BOS, and nothing else, around a text.

    A post-processor that already does so stays. One that adds nothing stays before ours; any other is replaced.
    """
    encoder = tokenizers.Tokenizer.from_str(text)
    plain, added = (encoder.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    if added == [tokenizer.bos, *plain]:
        return text
    bos = encoder.id_to_token(tokenizer.bos)
    template = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, tokenizer.bos)]
    )
    harmless = encoder.post_processor is not None and added == plain
    encoder.post_processor = processors.Sequence([encoder.post_processor, template]) if harmless else template
    return encoder.to_str(pretty=True)


def _read(path: Path) -> Companion:
    target = Path(os.path.realpath(path))
    if path.is_symlink() and target.name != path.name and target.parent.name != "blobs":
        raise ValueError(
            f"{shown(str(path))} is a link to {shown(str(target))}, which is another file; put a copy there if it"
            " belongs to the checkpoint"
        )
    text = read_text(path)
    return Companion(text, stat.S_IMODE(os.stat(path).st_mode) & 0o666)


def _programs(auto_map: Any) -> set[str]:
    """Return the modules in the folder that an `auto_map` names; its values are texts, or lists of texts and nulls."""
    if not isinstance(auto_map, dict):
        return set()
    values = [text for value in auto_map.values() for text in (value if isinstance(value, list) else [value])]
    matches = [PROGRAM.fullmatch(text) for text in values if isinstance(text, str)]
    return {match[1] for match in matches if match}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
