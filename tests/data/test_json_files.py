"""JSON in both of its forms, and lines that no one can read."""

import json

import pytest

from deepseek_jax.data import json_files
from deepseek_jax.data.documents import Problems
from tests.support.reading import TEXTS, contents, lines, read, skipping

RECORDS = [{"text": text, "n": [1]} for text in TEXTS]


@pytest.mark.parametrize(
    "content",
    [
        lines(TEXTS),
        b"\n\n" + lines(TEXTS).replace(b"\n", b"\r\n\r\n"),
        b"\xef\xbb\xbf" + lines(TEXTS),
        json.dumps(RECORDS).encode(),
        json.dumps(RECORDS, indent=2).encode(),
        b"[" + lines(TEXTS).strip().replace(b"\n", b",\n") + b"\n]\n",
    ],
)
def test_the_content_of_a_json_file_decides(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert contents(tmp_path / "a.json") == TEXTS
    assert read(tmp_path / "a.json")[0][0].name.startswith("a.json:")


def test_one_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[0], indent=1))
    assert contents(tmp_path / "a.json") == TEXTS[:1]
    (tmp_path / "a.json").write_text(json.dumps({"rows": RECORDS}, indent=1))
    with pytest.raises(ValueError, match=r"a.json has no text under text_field = 'text' \(it has keys \['rows'\]\)"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message", "left"),
    [
        (lines(TEXTS) + b'{"text": "half', "line 4 is not JSON text", 3),
        (b'{"text": "half\n' + lines(TEXTS), "line 1 is not JSON text", 3),
        (json.dumps(RECORDS, indent=1).encode()[:-9], "has neither one JSON value per line nor one in all", 0),
        (json.dumps([*RECORDS, {"body": "x"}, 5]).encode(), r"item 4 has no text .* keys \['body'\]", 3),
        (b"12", "line 1 has no text under text_field = 'text' .it has a int", 0),
        (b"<html>", "line 1 is not JSON text|neither one JSON value", 0),
        (b'{"text": "' + b"x" * 3000 + b'"}\n' + lines(TEXTS), "line 1 is longer than 2000 bytes", 3),
        (b'[{"text":\n"' + b"x" * 5000 + b'"}]', "is one JSON value of more than 4000 bytes; .* jq -c", 0),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply|longer|more than", 0),
    ],
)
def test_damaged_json_files(tmp_path, content, message, left, monkeypatch):
    monkeypatch.setattr(json_files, "LONGEST_LINE", 2000)
    monkeypatch.setattr(json_files, "LARGEST_VALUE", 4000)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.json .*(" + message + r").*data\.on_error = 'skip'"):
        read(tmp_path / "a.json")
    texts, _ = skipping(tmp_path / "a.json")
    assert texts == TEXTS[:left]


def test_a_deep_line_is_one_item(tmp_path):
    """Case 09: RecursionError is no ValueError."""
    deep = b'{"text": "a comment thread", "replies": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n"
    for name in ("nested.jsonl", "nested.json"):
        (tmp_path / name).write_bytes(lines(TEXTS[:1]) + deep + lines(TEXTS[1:]))
        texts, (message,) = skipping(tmp_path / name)
        assert texts == TEXTS
        assert f"{name} line 2 is JSON that is nested too deeply" in message


def test_escape_codes_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "red\x1b[31m.jsonl"
    path.write_text(json.dumps({"\x1b[2J": 1, "key" * 1000: 2, "\u202e": 3}) + "\n")
    with pytest.raises(ValueError, match="has no text") as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert "red\\x1b[31m.jsonl line 1" in message
    assert len(message) < 600


def test_lines_end_where_they_should(monkeypatch):
    monkeypatch.setattr(json_files, "READ_AT_ONCE", 3)
    monkeypatch.setattr(json_files, "LONGEST_LINE", 7)
    for content in (b"", b"a", b"a\n", b"\n\n", b"abcdefg\nh", b"abcdefgh\nabc\n", b"ab\nabcdefghijkl", b"\xff\n\nb"):
        stream = iter([content[i : i + 3] for i in range(0, len(content), 3)])
        expected = [line if len(line) <= 7 else None for line in content.split(b"\n")]
        if expected[-1] == b"":
            expected.pop()
        assert list(json_files.lines(lambda _, stream=stream: next(stream, b""))) == expected


@pytest.mark.parametrize("on_error", ["refuse", "skip"])
def test_what_a_library_says_is_escaped_too(on_error):
    problems = Problems(on_error)
    try:
        problems.report("Arrow says: \x1b[2J")
        message = problems.messages[0]
    except ValueError as error:
        message = str(error)
    assert message.startswith("Arrow says: \\x1b[2J")
