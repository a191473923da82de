"""The model of a folder in Hugging Face's format, opened for text without a workdir."""

import json
import os

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import BOS, EOS
from deepseek_jax.inference.completions import complete
from deepseek_jax.inference.generate import expert_mesh, longest_text
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.parameters import Fp8Weight
from experiments.model_source import open_released, open_run
from tests.golden import hf_checkpoint

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
LETTERS = [chr(ord("a") + i) for i in range(26)]
GENERATION = {"eos_token_id": [1, 27], "temperature": 0.6, "top_p": 0.95, "do_sample": True, "bos_token_id": 0}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def write_folder(folder, case="fp8", **files):
    """A golden checkpoint with a tokenizer of 26 letters, and what a released folder has beside it."""
    os.symlink(hf_checkpoint.FOLDER / case / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text((hf_checkpoint.FOLDER / case / "config.json").read_text())
    encoder = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate([BOS, EOS, *LETTERS])}, []))
    encoder.pre_tokenizer, encoder.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    encoder.add_special_tokens([BOS, EOS])
    encoder.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_folder_in_fp8_is_decoded_as_stored(tmp_path):
    source = open_released(write_folder(tmp_path))
    assert source.config.execution.precision == "fp8" and longest_text(source.config) == 128
    assert source.generation == ({"temperature": 0.6, "top_p": 0.95}, (1, 27))
    assert source.tokenizer().eos == 1
    weights = source.load(expert_mesh(source.config.model, 1))
    leaves = jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
    assert sum(isinstance(leaf, Fp8Weight) for leaf in leaves) > 10


@pytest.mark.slow
def test_texts_end_where_the_folder_says_and_begin_as_its_template(tmp_path):
    source = open_released(write_folder(tmp_path))
    mesh, tokenizer = expert_mesh(source.config.model, 1), source.tokenizer()
    weights, rest = source.load(mesh), (12, GREEDY, 0, mesh)
    found = complete(source.config, weights, tokenizer, LETTERS, *rest)
    assert all(set(each.text) <= set(LETTERS) and each.num_tokens == len(each.text) for each in found)
    i = max(range(26), key=lambda i: len(set(found[i].text)))
    text, end = found[i].text, tokenizer.encode(found[i].text[-1])[0]  # another end: the text stops before it
    cut = complete(source.config, weights, tokenizer, LETTERS, *rest, [end])
    assert len(set(text)) > 2 and cut[i][:3] == (text[: text.index(text[-1])], "stop", text.index(text[-1]))
    template = ChatTemplate.load(source.chat_folder)
    prompts = [template.encode(tokenizer, [{"role": "user", "content": letter}]) for letter in LETTERS]
    assert complete(source.config, weights, tokenizer, prompts, *rest) == found


def test_other_folders_are_decoded_in_bf16(tmp_path):
    source = open_released(write_folder(tmp_path, "base", generation_config__json='{"do_sample": false, "top_p": 0.9}'))
    assert source.config.execution.precision == "bf16"
    assert source.generation == ({"temperature": 0.0}, ())
    assert np.isfinite(np.float32(source.load(expert_mesh(source.config.model, 1)).params["head_DV"])).all()
    (tmp_path / "generation_config.json").unlink()
    assert open_released(tmp_path).generation == ({}, ())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config__json": '{"temperature": "hot"}'}, "temperature is 'hot', which is no number; repair"),
        ({"generation_config__json": '{"eos_token_id": 32}'}, "eos_token_id has 32, and the model's ids are 0 to 31"),
        ({"generation_config__json": '{"eos_token_id": [1, true]}'}, "eos_token_id has True"),
        ({"generation_config__json": "{"}, "generation_config.json"),
        ({"config__json": '{"training": {}}'}, "is the workdir of a run: give --workdir instead of --hf"),
        ({"tokenizer__json": "x"}, "tokenizer.json"),
    ],
)
def test_a_folder_with_a_wrong_file_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        open_released(write_folder(tmp_path, **files))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a checkpoint in Hugging Face's format and no run: give --hf instead"):
        open_run(write_folder(tmp_path), None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        open_released(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        open_released(tmp_path / "nowhere")
