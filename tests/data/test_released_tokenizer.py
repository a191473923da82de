"""DeepSeek's own tokenizer.json under our `Tokenizer`."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers

from deepseek_jax.data.bpe import pre_tokenizer
from deepseek_jax.data.tokenizer import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    StreamDecoder,
    Tokenizer,
)
from tests.support.released import TEXTS, folder, tokenizer

SHA256 = "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d"
TOOL_PARTS = [
    "calls▁begin",
    "calls▁end",
    "call▁begin",
    "call▁end",
    "outputs▁begin",
    "outputs▁end",
    "output▁begin",
    "output▁end",
    "sep",
]


@pytest.fixture(scope="module")
def theirs():
    """The file without our class around it."""
    return tokenizers.Tokenizer.from_file(str(folder() / "tokenizer.json"))


def test_it_is_the_file_we_know():
    assert hashlib.sha256((folder() / "tokenizer.json").read_bytes()).hexdigest() == SHA256


def test_special_ids():
    ours = tokenizer()
    expected = {
        BOS: 0,
        EOS: 1,
        PAD: 2,
        "<think>": 128_798,
        "</think>": 128_799,
        FIM_HOLE: 128_800,
        FIM_BEGIN: 128_801,
        FIM_END: 128_802,
    }
    expected |= {"<｜User｜>": 128_803, "<｜Assistant｜>": 128_804, "<|EOT|>": 128_805}
    expected |= {f"<｜tool▁{part}｜>": 128_806 + i for i, part in enumerate(TOOL_PARTS)}
    # two of 800 became R1's think tokens
    placeholders = {f"<｜place▁holder▁no▁{i}｜>": 128_000 + i for i in range(798)}
    assert ours.special_ids == expected | placeholders
    assert (ours.bos, ours.eos, ours.fim_hole, ours.fim_begin, ours.fim_end) == (0, 1, 128_800, 128_801, 128_802)
    assert ours.vocab_size == 128_815


def test_padding_is_what_the_config_beside_says(tmp_path):
    assert tokenizer().pad == tokenizer().eos == 1  # tokenizer_config.json has it so
    (tmp_path / "tokenizer.json").write_bytes((folder() / "tokenizer.json").read_bytes())
    assert Tokenizer.load(tmp_path / "tokenizer.json").pad == 2


def test_stages_are_those_of_our_pre_tokenizer(theirs):
    def stages(encoder):
        return json.loads(encoder.to_str())["pre_tokenizer"]["pretokenizers"]

    ours = tokenizers.Tokenizer(tokenizers.models.BPE())
    ours.pre_tokenizer = pre_tokenizer()
    assert stages(ours) == stages(theirs)


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_loses_nothing_and_knows_its_bytes(text):
    ours = tokenizer()
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert b"".join(ours.token_bytes[i] for i in ids) == ours.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(ours.special_ids.values())
    assert [list(each) for each in ours.encode_batch([text, "x"])] == [ids, ours.encode("x")]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_file(theirs, text):
    """Except where a special token is spelled out, which the file alone takes for the token."""
    expected = theirs.encode(text, add_special_tokens=False).ids
    spelled_out = set(expected) & set(tokenizer().special_ids.values())
    assert spelled_out if "<｜User｜>" in text else tokenizer().encode(text) == expected


def test_special_tokens_are_silent_but_for_those_of_reasoning():
    ours = tokenizer()
    ids = [0, 128_803, *ours.encode("é"), 128_804, 128_798, *ours.encode("x"), 128_799, 128_814, 128_000, 1]
    assert ours.decode(ids) == "é<think>x</think>"
    assert ours.decode_bytes(ids).decode() == ours.decode(ids)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    ours = tokenizer()
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert again.special_ids == ours.special_ids
    assert again.token_bytes == ours.token_bytes
    assert again.fingerprint == ours.fingerprint
    saved, released = (json.loads((path / "tokenizer.json").read_text("utf-8")) for path in (tmp_path, folder()))
    assert saved["added_tokens"] == released["added_tokens"]  # what the file calls special is left as it was


@pytest.mark.parametrize("text", TEXTS)
def test_stream_cut_at_every_token(text):
    ours = tokenizer()
    decoder = StreamDecoder(ours)
    pieces = [decoder.push([i]) for i in ours.encode(text)]
    assert decoder.finish() == ""
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_stream_holds_a_character_until_it_is_whole():
    ours = tokenizer()
    ids = ours.encode("𝕊🇩龦")
    assert any("\ufffd" in ours.decode([i]) for i in ids)  # some tokens are part of a character
    decoder = StreamDecoder(ours)
    pieces = [decoder.push(np.array([i])) for i in ids]
    assert "" in pieces
    assert "".join(pieces) == "𝕊🇩龦"
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_marks_what_is_really_broken():
    ours = tokenizer()
    first = next(i for i, piece in enumerate(ours.token_bytes) if piece == b"\xe6")
    decoder = StreamDecoder(ours)
    assert [decoder.push([first]), decoder.push(ours.encode("a")), decoder.push([first]), decoder.finish()] == [
        "",
        "\ufffda",
        "",
        "\ufffd",
    ]
    assert [decoder.push(ours.encode("b")), decoder.finish()] == ["b", ""]  # a new text
    assert decoder.push([]) == ""
