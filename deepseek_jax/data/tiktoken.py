"""A tokenizer.json made from `tiktoken.model`, the form in which Moonlight and Kimi-K2 are published.

The file has one line per token: its bytes in base64, and its rank, which is also its id. Text is cut into pieces by a
regular expression. A piece that is a token becomes this token. Any other begins as single bytes, and of all neighbours
whose joined bytes are a token, those of the lowest rank are joined, the leftmost first, until none are left.

`tokenizers` joins pairs from a list, the first in the list first. So each token needs the pairs that may become it:

    ranks     a 0  b 1  c 2  ... ab 256  abc 257  bc 258
    abc       a b c -> ab c -> abc      the pair (ab, c); (a, bc) never occurs, because ab is joined before bc

One pair is enough, the last two parts of the token's own bytes when they are joined by the rule above. Take a place in
a text where two neighbours are joined to a token. No earlier join crossed the ends of its bytes, or the neighbours
would not end there. So the joins between these ends were those of the bytes alone, in the same order, and led to the
same two parts. A token that its bytes do not lead to is found only as a whole piece (`ignore_merges`).

The regular expression and the special tokens are not in the file. The former is read from the program beside it
(`tokenization_*.py`, an attribute `pat_str`), whose text is parsed and never run. The latter are in tokenizer_config's
`added_tokens_decoder`.
"""

import ast
import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from deepseek_jax.data.tokenizer import byte_symbols
from deepseek_jax.inputs import read_bytes, read_json, read_text, shown

FILE = "tiktoken.model"
PROGRAMS = "tokenization_*.py"
LARGEST_PROGRAM = 1 << 20  # bytes
LARGEST_RANK = 2**31 - 1

Pair = tuple[bytes, bytes]


def convert(folder: Path) -> str:
    """Return the text of a tokenizer.json that encodes as the folder's `tiktoken.model` does.

    Raises:
        ValueError: a file is missing or damaged, or the regular expression is not a plain text of the program.
    """
    ranks = read_ranks(folder / FILE)
    special = _special_tokens(read_json(folder / "tokenizer_config.json"), str(folder / "tokenizer_config.json"))
    return make_tokenizer(ranks, _pattern(folder), special, str(folder / FILE)).to_str()


def make_tokenizer(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], origin: str
) -> tokenizers.Tokenizer:
    """Return a tokenizer of byte-level tokens.

    Args:
        ranks: the id of each token by its bytes; the 256 single bytes are among them.
        pattern: the regular expression that cuts text into pieces.
        special: the ids of special tokens by their text.
        origin: where this comes from, for messages.

    Raises:
        ValueError: special tokens have ids or texts of other tokens, or the pattern is not understood.
    """
    vocabulary = {_symbols(token): rank for token, rank in ranks.items()}
    taken = set(ranks.values())
    for text, token_id in special.items():
        if text in vocabulary or token_id in taken:
            raise ValueError(
                f"{shown(origin)}: the special token {shown(repr(text))} with id {token_id} is also an ordinary token;"
                " take the tokenizer_config.json that belongs to it"
            )
        taken.add(token_id)
    pairs = [(rank, pair) for token, rank in ranks.items() if (pair := last_pair(token, ranks)) is not None]
    merges = [(_symbols(left), _symbols(right)) for _, (left, right) in sorted(pairs)]
    try:
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
        encoder = tokenizers.Tokenizer(models.BPE(vocab={**vocabulary, **special}, merges=merges, ignore_merges=True))
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"{shown(origin)} cannot be converted: {shown(str(error))}; convert it elsewhere") from error
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    encoder.decoder = decoders.ByteLevel()
    for text in special:
        if any(piece == text for piece, _ in encoder.pre_tokenizer.pre_tokenize_str(text)):
            raise ValueError(
                f"{shown(origin)}: the special token {shown(repr(text))} is one word of ordinary text; convert"
                " it elsewhere"
            )
    encoder.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return encoder


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token of a file in tiktoken's form.

    Raises:
        ValueError: the file is missing or damaged.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            token, value = base64.b64decode(text, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{shown(str(path))}, line {number}: not a token in base64 and its rank; download the file again"
            ) from error
        if not token or token in ranks or not 0 <= value <= LARGEST_RANK:
            raise ValueError(
                f"{shown(str(path))}, line {number}: an empty token, one that is there twice, or a wrong rank; download"
                " the file again"
            )
        ranks[token] = value
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent or len(set(ranks.values())) < len(ranks):
        what = f"lacks the byte {absent[0]}" if absent else "gives one rank to several tokens"
        raise ValueError(f"{shown(str(path))} {what}; download the file again")
    return ranks


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> Pair | None:
    """Return the two parts that become `token` when its bytes are joined by rank; None if they do not lead to it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, LARGEST_RANK + 1) for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(joined)
        if lowest > LARGEST_RANK:
            return None
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _symbols(token: bytes) -> str:
    table = byte_symbols()
    return "".join(table[byte] for byte in token)


def _special_tokens(settings: Mapping[str, Any], origin: str) -> dict[str, int]:
    try:
        added = settings["added_tokens_decoder"].items()
        special = {token["content"]: int(token_id) for token_id, token in added}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{shown(origin)} has no added_tokens_decoder that gives the text of each special token by its id; take the"
            f" file that belongs to {FILE}"
        ) from error
    if not all(isinstance(text, str) and 0 <= token_id <= LARGEST_RANK for text, token_id in special.items()):
        raise ValueError(f"{shown(origin)}: added_tokens_decoder has a wrong id or text; take the file of {FILE}")
    return special


def _pattern(folder: Path) -> str:
    """Return the regular expression in the program beside `tiktoken.model`."""
    programs = sorted(folder.glob(PROGRAMS))
    found = {pattern for program in programs if (pattern := _assigned_pattern(program)) is not None}
    if len(found) != 1:
        what = "several programs with a" if found else "no program with a plain"
        raise ValueError(
            f"{shown(str(folder))} has {FILE}, no tokenizer.json, and {what} pat_str, the expression that cuts text"
            f" into words; download the checkpoint's {PROGRAMS}, or put a tokenizer.json there"
        )
    return found.pop()


def _assigned_pattern(program: Path) -> str | None:
    """Return what a program assigns to `pat_str`: a text, or texts joined by another. Nothing of it is run."""
    try:
        tree = ast.parse(read_text(program, LARGEST_PROGRAM))
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{shown(str(program))} is not a Python program; download it again") from error
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id="pat_str")], value=ast.Constant(value=str(text))):
                return text
            case ast.Assign(
                targets=[ast.Name(id="pat_str")],
                value=ast.Call(
                    func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"),
                    args=[ast.List(elts=parts) | ast.Tuple(elts=parts)],
                ),
            ):
                texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                if len(texts) == len(parts):
                    return between.join(texts)
    return None
