"""The scripts of the chat page without a browser: streams put together, Markdown to data. They run in Node."""

import json
import shutil
import subprocess

import pytest

from deepseek_jax.serving.page import FOLDER

pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="no Node on this machine")


def run(script, value=None):
    """Return what a script leaves in `result`; it sees `value`, and what the page's modules export."""
    imports = "".join(
        f"import * as {name} from {json.dumps((FOLDER / f'{name}.js').as_uri())};" for name in ("markdown", "stream")
    )
    source = f"{imports} const value = {json.dumps(value)}; let result; {script}; console.log(JSON.stringify(result));"
    done = subprocess.run(
        ["node", "--input-type=module", "-e", source], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


STREAM = (
    ': ping\r\n\r\ndata: {"choices":[{"delta":{"role":"assistant","content":""}}]}\r\n\r\n'
    'data: {"choices":[{"delta":{"reasoning_content":"Hm, ü"}}]}\n\n: ping\n\n'
    'data: {"choices":[{"delta":{"content":"Grüße 🙂"}}]}\n\n'
    'event: other\ndata: {"choices":[{"delta":{"content":"!"},"finish_reason":"stop"}]}\n\n'
    'data: {"choices":[],"usage":{"prompt_tokens":80,"completion_tokens":11,'
    '"prompt_tokens_details":{"cached_tokens":64},"completion_tokens_details":{"accepted_prediction_tokens":6,"rejected_prediction_tokens":2}}}\n\n'
    "data: [DONE]\n\n"
)


def test_a_stream_cut_at_every_byte_gives_the_same_answer():
    answers = run(
        """
        const bytes = new TextEncoder().encode(value);
        result = [];
        for (let cut = 0; cut <= bytes.length; cut++) {
            const body = new ReadableStream({ start(c) {
                for (const piece of [bytes.slice(0, cut), bytes.slice(cut)]) c.enqueue(piece);
                c.close();
            } });
            const answer = new stream.Answer(10);
            let time = 11, ended = false;
            for await (const data of stream.events(body)) ended = answer.take(data, time++) || ended;
            result.push([ended, answer.reasoning, answer.content, answer.finish, answer.speed()]);
        }""",
        STREAM,
    )
    # The events with text come at 12, 13 and 14.
    speed = "11 tokens · first after 2.0 s · 5.0 tokens/s · 75 % of 8 drafts accepted · 64 of 80 prompt tokens cached"
    assert len(answers) == len(STREAM.encode()) + 1
    assert {json.dumps(a, ensure_ascii=False) for a in answers} == {
        json.dumps([True, "Hm, ü", "Grüße 🙂!", "stop", speed], ensure_ascii=False)
    }


def test_completions_and_errors_in_a_stream():
    text, message = run(
        """
        const answer = new stream.Answer(0);
        answer.take('{"choices":[{"text":"def "}]}', 1);
        result = [answer.content];
        try { answer.take('{"error":{"message":"The cache is full."}}', 2); } catch (e) { result.push(e.message); }"""
    )
    assert (text, message) == ("def ", "The cache is full.")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "max_tokens=-1 must be positive", "code": "x"}}', "max_tokens=-1 must be positive"),
        ('{"error": "no"}', "no"),
        ('{"detail": "Not Found"}', "Not Found"),
        ("<html>Bad gateway", "The server answered 502. <html>Bad gateway"),
        ("", "The server answered 502."),
    ],
)
def test_the_message_of_an_error(body, message):
    assert run("result = stream.errorMessage(502, value)", body) == message


def plain(parts):
    """Return inline parts as one text with marks."""
    marks = {"text": "{}", "code": "`{}`", "strong": "<b>{}</b>", "emphasis": "<i>{}</i>", "link": "[{}]"}
    return "".join(marks[p["kind"]].format(plain(p["inline"]) if "inline" in p else p["text"]) for p in parts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b *c* d** `x*y*` e", "a <b>b <i>c</i> d</b> `x*y*` e"),
        ("2 * 3 * 4 and snake_case_name", "2 * 3 * 4 and snake_case_name"),
        ("_so_ __very__ \\*not\\*", "<i>so</i> <b>very</b> *not*"),
        ("**open and `open", "**open and `open"),
        ("``a ` b`` <b>c</b>", "`a ` b` <b>c</b>"),
        ("[site](https://x.org/a) https://y.org/b.", "[site] [https://y.org/b]."),
        ("[bad](javascript:alert(1))", "[bad](javascript:alert(1))"),
        ("[bad](java\nscript:alert(1)) [", "[bad](java\nscript:alert(1)) ["),
    ],
)
def test_inline_markdown(text, expected):
    (block,) = run("result = markdown.parse(value)", text)
    assert block["kind"] == "paragraph"
    assert plain(block["inline"]) == expected


def test_blocks():
    text = (
        "# Title #\nA line\nand another\n\n```python\nx = '```'\n# no heading\n```\n1. one\n   more\n2. two\n   - in\n"
        "> said\n> > twice\n\n---\n|a|b|\n|-|:-:|\n|1|`2`|\n\n```\nnever closed\n"
    )
    blocks = run("result = markdown.parse(value)", text)
    assert [block["kind"] for block in blocks] == [
        "heading", "paragraph", "code", "list", "quote", "rule", "table", "code",
    ]  # fmt: skip
    heading, paragraph, code, items, quote, _, table, unclosed = blocks
    assert (heading["level"], plain(heading["inline"])) == (1, "Title")
    assert plain(paragraph["inline"]) == "A line\nand another"
    assert (code["language"], code["text"]) == ("python", "x = '```'\n# no heading")
    shown = [(item["depth"], item["marker"], plain(item["inline"])) for item in items["items"]]
    assert shown == [(0, "1.", "one\nmore"), (0, "2.", "two"), (1, "•", "in")]
    assert [block["kind"] for block in quote["blocks"]] == ["paragraph", "quote"]
    assert [[plain(cell) for cell in row] for row in table["rows"]] == [["a", "b"], ["1", "`2`"]]
    assert unclosed["text"] == "never closed\n"


MARKS = [
    "[",
    "*a ",
    "**a",
    "_a",
    "`",
    "`a``b```",
    "> ",
    ">",
    "- ",
    "![](",
    "[a](http://",
    "\\",
    "#",
    "h",
    "~~~",
    "|a\n",
]


def test_a_text_takes_time_in_proportion_to_its_length():
    slow = run(
        """
        const texts = value.map((mark) => mark.repeat(50000));
        texts.push("[".repeat(1000000) + "](" + "x".repeat(200000) + ")", "_".repeat(200000) + "a__");
        texts.push("*[".repeat(100000) + "](http:" + "/".repeat(100000) + ")");
        result = texts.filter((text) => {
            const start = process.cpuUsage();
            markdown.parse(text);
            return process.cpuUsage(start).user > 1e6;
        }).map((text) => text.slice(0, 10));""",
        MARKS,
    )
    assert slow == []
