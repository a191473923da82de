"""Lossless encoding, and where a tokenizer comes from; test_released_tokenizer.py has the pre-tokenizer."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from deepseek_jax.data.bpe import byte_tokenizer, train_bpe
from deepseek_jax.data.run_tokenizer import make_tokenizer
from deepseek_jax.data.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, Tokenizer

TEXTS = [
    "",
    "def f(x):\r\n\treturn x ** 2\n\n\n# done\n",
    "  leading and trailing   ",
    "π ≈ 3.14159, 東京タワー333m 👩‍🔬é\u0301\x00\x7f\ufeff",
    "a\u2028b \u00a0 c\ufffd",
    # nearly every byte that UTF-8 has
    "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x777), *range(0xE000, 0x110000, 0x7777)])),
]


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_loses_nothing_and_counts_bytes(bpe, text):
    for tokenizer in (bpe, byte_tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.num_bytes_V[ids].sum() == len(text.encode()) if ids else text == ""


def test_part_of_a_character_decodes_to_its_bytes():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("é")
    assert tokenizer.decode_bytes(ids[:1]) == b"\xc3"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_special_tokens_have_v3_names_and_cannot_be_written_in_text(bpe):
    assert (bpe.bos, bpe.eos, bpe.pad) == (0, 1, 2)
    assert SPECIAL_TOKENS[bpe.fim_hole] == "<｜fim▁hole｜>"
    assert None not in (bpe.fim_begin, bpe.fim_hole, bpe.fim_end)
    text = f"a{EOS}b{BOS}"
    assert min(bpe.encode(text)) >= len(SPECIAL_TOKENS)
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([bpe.bos, *bpe.encode("x"), bpe.eos]) == "x"


def test_byte_tokenizer_is_the_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 262
    assert tokenizer.encode("é\n") == [6 + byte for byte in "é\n".encode()]


def test_training_is_deterministic(corpus_folder, bpe):
    texts = [path.read_text("utf-8") for path in sorted(corpus_folder.iterdir())]
    assert train_bpe(texts, bpe.vocab_size).fingerprint == bpe.fingerprint
    assert bpe.vocab_size == 700
    assert len(bpe.encode(texts[0])) < 0.6 * len(texts[0])


def test_saved_tokenizer_is_the_same_and_not_trained_again(tmp_path, make_config, bpe):
    bpe.save(tmp_path / "tokenizer.json")
    again = make_tokenizer(make_config("unused"), tmp_path, documents=(pytest.fail("the corpus was read") for _ in "x"))
    assert again.fingerprint == bpe.fingerprint
    assert again.encode(TEXTS[3]) == bpe.encode(TEXTS[3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_any_tokenizer_json_is_loaded_and_kept_with_the_run(tmp_path, make_config):
    encoder = tokenizers.Tokenizer(
        models.BPE(vocab={"<s>": 0, "</s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "▁a": 5}, merges=[("▁", "a")])
    )
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder.add_special_tokens(["<s>", "</s>"])
    encoder.save(str(tmp_path / "theirs.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    config = make_config("unused", tokenizer=str(tmp_path / "theirs.json"), vocab_size=6)
    for _ in range(2):  # loaded from the path, then from the workdir
        tokenizer = make_tokenizer(config, tmp_path / "run", documents=[])
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.fim_hole) == (0, 1, 1, None)
        assert tokenizer.token_bytes == (b"", b"", b"\n", b" ", b"a", b" a")


def test_a_model_with_too_few_ids_is_refused(tmp_path, make_config):
    with pytest.raises(
        ValueError,
        match=r"byte tokenizer needs 262 ids and model.vocab_size = 200; set model.vocab_size to at least 262",
    ):
        make_tokenizer(make_config("unused", tokenizer="byte", vocab_size=200), tmp_path, [])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="model.vocab_size = 100 is too small for BPE"):
        train_bpe(["a"], 100)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, make_config):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} is not a readable tokenizer.json"):
            make_tokenizer(make_config("unused", tokenizer=str(tmp_path / name)), tmp_path / "run", [])


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="name its bos_token and eos_token in .*tokenizer_config.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert PAD in SPECIAL_TOKENS
