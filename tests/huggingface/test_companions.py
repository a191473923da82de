"""The files beside the weights: through an import unchanged, and what an export adds to a run's own."""

import base64
import json
import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.tokenizer import BOS, TOKENIZER_FILES, Tokenizer
from deepseek_jax.huggingface import companions
from deepseek_jax.huggingface.config import is_fp8, read_model
from deepseek_jax.huggingface.config_writer import TokenIds, write_model

ABSENT = Path("/absent")
TEXT = f"def f(x):\n  return 'é' {BOS}"


@pytest.fixture(scope="module")
def config():
    return from_config_dict(tiny.get_config())


def ids_at_the_end(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json with the special tokens behind the 256 bytes."""
    file = json.loads(tokenizer._file)
    names = [token["content"] for token in file["added_tokens"]]
    plain = sorted(file["model"]["vocab"].keys() - set(names), key=file["model"]["vocab"].get)
    file["model"]["vocab"] = {token: i for i, token in enumerate([*plain, *names])}
    for token in file["added_tokens"]:
        token["id"] = file["model"]["vocab"][token["content"]]
    return json.dumps(file, ensure_ascii=False)


@pytest.fixture
def run(tmp_path) -> dict[str, str]:
    """The tokenizer files of a run whose BOS is 256, EOS 257 and padding 258."""
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(ids_at_the_end(byte_tokenizer()))
    return {name: (tmp_path / name).read_text() for name in TOKENIZER_FILES}


def test_a_run_is_exported_with_the_ids_of_its_tokenizer(run, config):
    for fp8 in (True, False):
        files = companions.export(ABSENT, run, config, fp8)
        assert list(files)[-1] == "config.json"  # it marks the folder complete
        hf = json.loads(files["config.json"].text)
        ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
        assert json.loads(files["generation_config.json"].text) == ids
        assert {key: hf[key] for key in ids} == ids and hf["torch_dtype"] == "bfloat16"
        assert hf["max_position_embeddings"] == config.data.sequence_length != config.model.yarn.original_length
        assert read_model(hf) == config.model and is_fp8(hf) == fp8


def test_an_exported_tokenizer_begins_texts_with_bos_for_others_alone(run, config, tmp_path):
    """Ours adds none, so the ids of a run that begins with the export are those of the run before."""
    files = companions.export(ABSENT, run, config, False)
    companions.write(tmp_path, files)
    before, after = Tokenizer.parse(run["tokenizer.json"], {}, tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert after.encode(TEXT) == before.encode(TEXT) == list(after.encode_batch([TEXT])[0])
    assert theirs.encode("ab").ids == [256, *before.encode("ab")]
    assert theirs.encode("a", "b").ids == [256, *before.encode("ab")]
    assert theirs.encode("ab", add_special_tokens=False).ids == before.encode("ab")
    again = companions.export(ABSENT, {name: files[name].text for name in TOKENIZER_FILES}, config, False)
    assert again["tokenizer.json"] == files["tokenizer.json"]  # not twice


@pytest.mark.parametrize(
    "post_processor",
    [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="$A <｜end▁of▁sentence｜>", special_tokens=[("<｜end▁of▁sentence｜>", 1)]),
    ],
)
def test_a_post_processor_of_another_kind(post_processor):
    encoder = tokenizers.Tokenizer.from_str(byte_tokenizer()._file)
    encoder.post_processor = post_processor
    text = companions.begin_with_bos(encoder.to_str(), byte_tokenizer())
    assert tokenizers.Tokenizer.from_str(text).encode("a").ids == [0, *byte_tokenizer().encode("a")]
    kept = "ByteLevel" in str(json.loads(text)["post_processor"])
    assert kept == ("ByteLevel" in type(post_processor).__name__)


@pytest.fixture
def imported(run, config, tmp_path) -> Path:
    """A downloaded folder with everything that may lie beside weights."""
    folder = tmp_path / "imported"
    folder.mkdir()
    hf = write_model(config.model, False, TokenIds(256, 257, 258), 77)
    hf |= {"pad_token_id": 300, "auto_map": {"AutoModel": "modeling_x.Model", "AutoConfig": "a--b/c.D"}}
    settings = json.loads(run["tokenizer_config.json"]) | {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}
    texts = run | {
        "config.json": json.dumps(hf),
        "tokenizer_config.json": json.dumps(settings),
        "generation_config.json": '{"temperature": 0.6}',
        "chat_template.jinja": "{{ bos_token }}\r\n",
        "modeling_x.py": "import other",
        "tokenization_x.py": "raise SystemExit",
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / "other.py").touch()
    return folder


def test_an_imports_files_come_back_as_they_are(imported, run, config):
    files = companions.read(imported)
    assert {name: file.text.encode() for name, file in files.items()} == {
        path.name: path.read_bytes() for path in imported.iterdir() if path.name != "other.py"
    }
    assert companions.export(imported, run, config, False) == files


def test_another_precision_changes_the_shape_of_the_config_alone(imported, run, config):
    files, exported = companions.read(imported), companions.export(imported, run, config, True)
    hf, old = json.loads(exported["config.json"].text), json.loads(files["config.json"].text)
    assert hf.keys() - old.keys() == {"quantization_config"} and old.items() <= hf.items()
    assert {name: exported[name] for name in files if name != "config.json"} == {
        name: file for name, file in files.items() if name != "config.json"
    }


def test_a_private_file_stays_private(imported, tmp_path):
    """A link is followed to a file of the same name and into the hub's cache, and a copy has the file's permissions."""
    template = imported / "chat_template.jinja"
    template.chmod(0o600)
    companions.write(tmp_path, companions.read(imported))
    assert (tmp_path / "chat_template.jinja").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "config.json").stat().st_mode & 0o077 == (imported / "config.json").stat().st_mode & 0o077
    secret = tmp_path / "secret"
    secret.write_text("mine")
    template.unlink()
    template.symlink_to(secret)
    with pytest.raises(ValueError, match="chat_template.jinja is a link to .*secret, which is another file"):
        companions.read(imported)
    for good in ("blobs/3f1c", "elsewhere/chat_template.jinja"):
        (tmp_path / good).parent.mkdir()
        (tmp_path / good).write_text("here")
        template.unlink()
        template.symlink_to(tmp_path / good)
        assert companions.read(imported)["chat_template.jinja"].text == "here"


WRONG = {
    "generation_config.json": (b"\xff\xfe\x00", "generation_config.json is not UTF-8 text"),
    "tokenizer_config.json": (b"{", "tokenizer_config.json is not valid JSON"),
    "config.json": (b"[]", "config.json holds a list, not a dict"),
    "chat_template.jinja": (None, "chat_template.jinja is a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(imported, name):
    content, message = WRONG[name]
    (imported / name).unlink()
    if content is None:
        (imported / name).mkdir()
    else:
        (imported / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        companions.read(imported)


# ---- the tokenizer of a checkpoint


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(imported, run):
    assert companions.read_tokenizer(imported, 262)["tokenizer.json"] == run["tokenizer.json"]
    file = json.loads(run["tokenizer.json"])
    file["added_tokens"].append(file["added_tokens"][-1] | {"id": 262, "content": "<extra>", "special": False})
    (imported / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="has ids up to 262, and the model's vocab_size is 262; put the tokenizer"):
        companions.read_tokenizer(imported, 262)


WRONG_TOKENIZERS = {
    "binary": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\x00"), "tokenizer.json is not UTF-8 text"),
    "broken": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is not a readable tokenizer.json"),
    "settings": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is not valid JSON"),
    "list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "holds a list, not a dict"),
    "absent": (lambda f: (f / "tokenizer.json").unlink(), r"lacks \['tokenizer.json'\]; a run needs its tokenizer"),
    "FIFO": (lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")), "is a FIFO"),
}


@pytest.mark.parametrize("case", WRONG_TOKENIZERS)
def test_wrong_tokenizers_are_refused(imported, case):
    spoil, message = WRONG_TOKENIZERS[case]
    spoil(imported)
    with pytest.raises(ValueError, match=message):
        companions.read_tokenizer(imported, 262)


def test_a_tokenizer_in_tiktokens_form_is_converted(tmp_path):
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {255 - byte}\n" for byte in range(256)]
    (tmp_path / "tiktoken.model").write_text("".join([*lines, f"{base64.b64encode(b'ab').decode()} 256\n"]))
    (tmp_path / "tokenization_x.py").write_text('pat_str = "[a-z]+|[^a-z]"')
    added = {"300": {"content": "[BOS]"}, "301": {"content": "[EOS]"}}
    settings = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    files = companions.read_tokenizer(tmp_path, 302)
    tokenizer = Tokenizer.parse(files["tokenizer.json"], json.loads(files["tokenizer_config.json"]), tmp_path)
    assert tokenizer.encode("cab!") == [255 - ord("c"), 256, 255 - ord("!")]
    with pytest.raises(ValueError, match="has ids up to 301"):
        companions.read_tokenizer(tmp_path, 301)
