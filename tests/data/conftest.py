"""A small real corpus, its tokenizer, and configs that differ from `deepseek_v3` in the data section."""

import sysconfig
from pathlib import Path

import pytest
import tokenizers

from configs import deepseek_v3
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data import pipeline
from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.data.tokenizer import Tokenizer

VOCAB_SIZE = 700
STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def make_config():
    def make(*paths: Path | str, vocab_size: int = VOCAB_SIZE, seed: int = 0, **data) -> Config:
        """Config of the sources at `paths`, equally weighted; FIM and splitting are off unless asked for."""
        config = deepseek_v3.get_config()
        config.seed = seed
        config.model.vocab_size = vocab_size
        sources = tuple({"path": str(path), "weight": 1.0} for path in paths)
        settings = {
            "sources": sources,
            "sequence_length": 64,
            "heldout_fraction": 0.2,
            "fim_rate": 0.0,
            "split_rate": 0.0,
        }
        config.data.update(settings | data)
        return from_config_dict(config)

    return make


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    """About 80 KB of real code in 40 documents of 137 to 4,200 characters."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join(path.read_text("utf-8") for path in sorted((STDLIB / "asyncio").glob("*.py")))
    start = 0
    for i in range(40):
        end = start + 137 + 1511 * i % 4099
        (folder / f"{i:02}.py").write_text(text[start:end], "utf-8")
        start = end
    return folder


@pytest.fixture(scope="session")
def bpe(corpus_folder):
    return train_bpe([path.read_text("utf-8") for path in sorted(corpus_folder.iterdir())], VOCAB_SIZE)


@pytest.fixture(scope="session")
def words():
    """A tokenizer that fails on every word but "good"."""
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<bos>": 0, "<eos>": 1, "good": 2}, unk_token="<unk>"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(encoder, "<bos>", "<eos>", "<eos>")


@pytest.fixture
def work(tmp_path_factory) -> Path:
    """A workdir that tests share: its token caches are named by what they depend on."""
    return tmp_path_factory.getbasetemp() / "shared_workdir"


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of a few documents, so that short tests cross many."""
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 4000)
    monkeypatch.setattr(pipeline, "WINDOW_ROWS", 8)
