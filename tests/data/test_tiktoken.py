"""tiktoken.model as a tokenizer.json: the same ids as tiktoken's own rule, written down here a second time."""

import base64
import collections
import json
import random
import re

import pytest

from deepseek_jax.data import tiktoken
from deepseek_jax.data.tokenizer import Tokenizer

WORDS = r"\s*[a-z=\-]+|\s+|[^\s]"
SPECIAL = {"[BOS]": 700, "[EOS]": 701, "<|im_end|>": 705}
PROGRAM = '''
raise SystemExit("never run")
class TikTokenTokenizer:
    pat_str = "|".join([
        r"""\\s*[a-z=\\-]+""",
        r"""\\s+""",
        r"""[^\\s]""",
    ])
'''
BYTES = {bytes([byte]): rank for rank, byte in enumerate(random.Random(0).sample(range(256), 256))}


def by_the_rule(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's encoding: whole pieces, else joins by lowest rank, the leftmost first."""
    ids = []
    for piece in re.findall(WORDS, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while True:
            pairs = [
                (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
            ]
            if not pairs:
                break
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def trained(generator: random.Random) -> dict[bytes, int]:
    """Ranks as training makes them: the most frequent pair becomes the next token."""
    ranks, parts = dict(BYTES), [bytes([byte]) for byte in text(generator, 600).encode()]
    while len(ranks) < 320:
        counts = collections.Counter(zip(parts, parts[1:], strict=False))
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        joined, i = [], 0
        while i < len(parts):
            step = 2 if parts[i : i + 2] == [left, right] else 1
            joined.append(b"".join(parts[i : i + step]))
            i += step
        parts = joined
    return ranks


def arbitrary(generator: random.Random) -> dict[bytes, int]:
    """Ranks as no training makes them: any tokens, in any order, some of which their own bytes do not lead to."""
    tokens = {text(generator, generator.randint(2, 7)).encode() for _ in range(60)} - BYTES.keys()
    ranks = generator.sample(range(256, 690), len(tokens))
    return BYTES | dict(zip(sorted(tokens), ranks, strict=True))


def text(generator: random.Random, length: int) -> str:
    return "".join(generator.choices("ab= é-", (5, 4, 4, 3, 1, 1), k=length))


@pytest.mark.parametrize("make", [trained, arbitrary])
def test_ids_are_those_of_the_rule(make):
    for seed in range(12):
        generator = random.Random(seed)
        ranks = make(generator)
        encoder = tiktoken.make_tokenizer(ranks, WORDS, SPECIAL, "here")
        for _ in range(40):
            sample = text(generator, generator.randint(0, 60))
            assert encoder.encode(sample, add_special_tokens=False).ids == by_the_rule(sample, ranks)


@pytest.fixture
def folder(tmp_path):
    ranks = trained(random.Random(1))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / "tiktoken.model").write_text("".join(lines))
    (tmp_path / "tokenization_kimi.py").write_text(PROGRAM)
    settings = {
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "added_tokens_decoder": {str(i): {"content": token, "special": False} for token, i in SPECIAL.items()},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_folder_is_converted_without_running_its_program(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.parse(tiktoken.convert(folder), settings, folder / "tokenizer.json")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (700, 701, 706)
    spelled = "ab= <|im_end|>é[BOS]\n"
    ids = tokenizer.encode(spelled)
    assert ids == by_the_rule(spelled, trained(random.Random(1)))  # special tokens spelled out are text
    assert tokenizer.decode([700, *ids, 705]) == spelled


WRONG = {
    "tiktoken.model": {
        b"YQ== 0\nYQ== 1\n": "line 2: an empty token, one that is there twice, or a wrong rank",
        b"YQ== 0\n": "lacks the byte 0; download the file again",
        b"\xff\xfe 1\n": "line 1: not a token in base64 and its rank",
        b"YQ==\n": "line 1: not a token in base64 and its rank",
        b"YQ== -1\n": "line 1: .*a wrong rank",
    },
    "tokenization_kimi.py": {
        b"pat_str = compute()": "has tiktoken.model, no tokenizer.json, and no program with a plain pat_str",
        b"(": "tokenization_kimi.py is not a Python program",
        b"pat_str = '('": "cannot be converted",
    },
    "tokenizer_config.json": {
        b"{}": "has no added_tokens_decoder",
        b'{"added_tokens_decoder": {"x": {"content": "a"}}}': "has no added_tokens_decoder",
        b'{"added_tokens_decoder": {"-1": {"content": "a"}}}': "a wrong id or text",
        b'{"added_tokens_decoder": {"3": {"content": "[BOS]"}}}': "with id 3 is also an ordinary token",
        b'{"added_tokens_decoder": {"900": {"content": "ab"}}}': "'ab' with id 900 is also an ordinary token",
    },
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, cases in WRONG.items() for content in cases])
def test_wrong_files_are_refused(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=WRONG[name][content]):
        tiktoken.convert(folder)
