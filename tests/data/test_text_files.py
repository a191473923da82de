"""A text is cut at line ends, a long line at spaces or between characters; nothing is lost."""

import io

import pytest

from deepseek_jax.data.documents import Problems
from deepseek_jax.data.text_files import LARGEST_BLOCK, block_size, cut_text, read_text


def contents(text: str, size: int) -> list[str]:
    return [block.content.decode() for block in cut_text(io.BytesIO(text.encode()), size)]


def read(path, on_error="refuse"):
    problems = Problems(on_error)
    return list(read_text("name", path, "text", problems)), problems


@pytest.mark.parametrize("size", [5, 64, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "".join(f"line {i} é\n" for i in range(500)),
        "word " * 1000,
        "x" * 3000 + "\n" + "short\n" * 3,
        "三" * 1000,
        "a" * 10 + "\n" + "b" * 11,
        "\n" * 300,
    ],
    ids=["lines", "one line", "no space", "no ASCII", "around two blocks", "empty lines"],
)
def test_blocks_are_the_text_and_bounded(text, size):
    blocks = contents(text, size)
    assert "".join(blocks) == text
    assert max(len(block.encode()) for block in blocks) <= 3 * size
    if len(text.encode()) > 3 * size:
        assert len(blocks) > 1


def test_lines_stay_whole_and_words_too():
    assert contents("one\ntwo\nthree\n", 5) == ["one\ntwo\n", "three\n"]
    assert contents("one two three four five", 8) == ["one two ", "three four five"]
    assert [block.place for block in cut_text(io.BytesIO(b"a\n" + b"b c " * 10), 8)] == ["1", *("2+8", "2+16", "2+24")]


def test_small_files_are_one_document_and_large_ones_many(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("é\n" * 1000)
    assert [(d.name, len(d.content), d.num_file_bytes) for d in read(path)[0]] == [("name", 2000, 3000)]
    path.write_text("word " * 60_000)  # like text8: one line of 300 KB
    documents, _ = read(path)
    assert "".join(document.content for document in documents) == path.read_text()
    assert 70 <= len(documents) <= 80 and documents[1].name == "name:1+4095"
    assert sum(document.num_file_bytes for document in documents) == path.stat().st_size


def test_blocks_grow_with_the_text_but_never_beyond_what_the_tokenizer_takes():
    assert [block_size(n) for n in (10, 10**7, 10**12)] == [4096, 10**4, LARGEST_BLOCK]


def test_what_is_not_utf8_is_left_out_by_block_and_a_file_that_does_not_begin_as_text_whole(tmp_path):
    path = tmp_path / "a.txt"
    lines = [b"text\n"] * 50_000
    path.write_bytes(b"".join(lines[:25_000] + [b"caf\xe9\n"] + lines[25_000:]))
    documents, problems = read(path, "skip")
    assert problems.count == 1 and problems.messages[0].endswith("a.txt is not UTF-8 text (line 25001)")
    assert 55 <= len(documents) <= 62
    path.write_bytes(b"\x89PNG\n" + bytes(300_000))  # zeros would be text
    documents, problems = read(path, "skip")
    assert not documents and problems.count == 1
