"""Replies read while they come: however they are cut, the pieces joined are the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.deepseek_chat import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR
from deepseek_jax.inference.text import Text
from deepseek_jax.serving.reply import STRUCTURE, THINK, Content, Reasoning, ReplyReader, mark
from deepseek_jax.serving.tool_calls import MOST_HEADER, CallArguments, CallStart
from tests.support.released import tokenizer

MARKS = {mark(name): name for name in STRUCTURE}
SPELLED = {name: name for name in STRUCTURE}  # of a tokenizer that has no such tokens
V3 = f'{CALLS}{CALL}function{SEPARATOR}get_time\n```json\n{{"city": "東京 ```"}}\n```{END_CALL}'
V3_TWO = f"{V3}\n{CALL}function{SEPARATOR}f.g-h\n```json\n{{}}\n```{END_CALL}{END_CALLS}"
V31 = (
    f'{CALLS}{CALL}get_time{SEPARATOR}{{"city": "東京 👩‍🔬"}}{END_CALL}{CALL}f.g-h{SEPARATOR}{{}}{END_CALL}{END_CALLS}'
)
TIME, OTHER = ("get_time", '{"city": "東京 ```"}'), ("f.g-h", "{}")

# text, whether the prompt had opened the reasoning, reasoning, content, calls
GOLDEN = [
    ("", False, "", "", []),
    ("Hello, 世界!\n", False, "", "Hello, 世界!\n", []),
    (" \n Hello", False, "", " \n Hello", []),
    (" \n", False, "", " \n", []),
    # reasoning: opened by the prompt, by the model, not at all
    ("plan\n\nmore\n</think>\n\nanswer\n", True, "plan\n\nmore", "answer\n", []),
    ("\nplan</think>answer", True, "plan", "answer", []),
    ("<think>\nplan\n</think>\n\nanswer", False, "plan", "answer", []),
    ("<think>\nplan\n</think>\n\nanswer", True, "plan", "answer", []),
    ("</think>\n\nanswer", True, "", "answer", []),
    ("</think>\n\nanswer", False, "", "answer", []),
    ("<think>\n\n</think>\n\nanswer", False, "", "answer", []),
    # it never closes: it was reasoning, and there is no content
    ("plan\n\nand so on\n", True, "plan\n\nand so on\n", "", []),
    ("<think>plan", False, "plan", "", []),
    # it was never opened: all is content
    ("plan\n</think>\n\nanswer", False, "", "plan\n</think>\n\nanswer", []),
    ("The tag <think> opens.", False, "", "The tag <think> opens.", []),
    ("plan <think> more</think>a<think>b</think>c", True, "plan <think> more", "a<think>b</think>c", []),
    # calls
    (V3 + END_CALLS, False, "", "", [TIME]),
    (V3_TWO, False, "", "", [TIME, OTHER]),
    (f"I look.\n\n{V31}", False, "", "I look.\n\n", [("get_time", '{"city": "東京 👩‍🔬"}'), OTHER]),
    (f"<think>plan</think>\n\n{V3_TWO}", False, "plan", "", [TIME, OTHER]),
    (f"plan\n{V3_TWO}", True, "plan", "", [TIME, OTHER]),  # the tokens end reasoning
    (f"{CALL}f{SEPARATOR}{{}}", False, "", "", [("f", "{}")]),  # ends here
    (f"{CALL}f{SEPARATOR}{{}}{END_CALLS} after", False, "", " after", [("f", "{}")]),
    (f'{CALL}f{SEPARATOR}{{"a": "x y ', False, "", "", [("f", '{"a": "x y ')]),
    (f"{CALL}function{SEPARATOR}f\n```json\n{{}}\n```", False, "", "", [("f", "{}")]),
    (f"{CALL}function{SEPARATOR}f\n```json\n{{}}\n`", False, "", "", [("f", "{}\n`")]),
    (f"{CALL}function{SEPARATOR} f \n{{}}{END_CALL}", False, "", "", [("f", "{}")]),
    (f"{CALL}function{SEPARATOR}{{}}{END_CALL}", False, "", "", [("function", "{}")]),
    (f"{CALL}f{SEPARATOR}\n```json\n{{}}\n```{END_CALL}{END_CALLS}", False, "", "", [("f", "{}")]),
    (f"{CALL}f{SEPARATOR}{END_CALL}", False, "", "", [("f", "{}")]),  # without arguments
    (f"{CALL}function{SEPARATOR}g\n```json\n```{END_CALL}", False, "", "", [("g", "{}")]),
    (f"{CALL}f{SEPARATOR}{{{SEPARATOR}{THINK}}}{END_CALL}", False, "", "", [("f", f"{{{SEPARATOR}{THINK}}}")]),
    (f"{CALLS}\n {CALL}f{SEPARATOR}{{}}{END_CALL}\n{END_CALLS}\n\nDone", False, "", "Done", [("f", "{}")]),
    (f"{CALLS}{CALL}f{SEPARATOR}{{}}{END_CALL} wait", False, "", " wait", [("f", "{}")]),
    # malformed ones are content
    (f"a{CALL}", False, "", f"a{CALL}", []),
    (f"{CALLS}{CALL}function{SEPARATOR}get_ti", False, "", f"{CALL}function{SEPARATOR}get_ti", []),
    (f"{CALL}f{SEPARATOR}[1]{END_CALL}{END_CALLS}b", False, "", f"{CALL}f{SEPARATOR}[1]{END_CALL}{END_CALLS}b", []),
    (f"{CALL}two words{SEPARATOR}{{}}{END_CALL}", False, "", f"{CALL}two words{SEPARATOR}{{}}{END_CALL}", []),
    (f"{CALL}{SEPARATOR}{{}}{END_CALL}", False, "", f"{CALL}{SEPARATOR}{{}}{END_CALL}", []),
    (f"{CALL}f{{}}{CALL}g{SEPARATOR}{{}}{END_CALL}", False, "", f"{CALL}f{{}}", [("g", "{}")]),
    (f"{CALL}{'x' * 2 * MOST_HEADER}", False, "", f"{CALL}{'x' * 2 * MOST_HEADER}", []),
    (f"{CALL}f{SEPARATOR}{' ' * MOST_HEADER}{{}}", False, "", f"{CALL}f{SEPARATOR}{' ' * MOST_HEADER}{{}}", []),
    (
        f"{CALL}function{SEPARATOR}f\n{' ' * MOST_HEADER}{{}}",
        False,
        "",
        f"{CALL}function{SEPARATOR}f\n{' ' * MOST_HEADER}{{}}",
        [],
    ),
    (f"a{END_CALL}b{SEPARATOR}c{END_CALLS}", False, "", f"a{END_CALL}b{SEPARATOR}c{END_CALLS}", []),
]


def marked(text):
    for name in STRUCTURE:
        text = text.replace(name, mark(name))
    return text


def read(parts, thinking=False, marks=MARKS):
    """Return reasoning, content, calls and the word for the end."""
    reply = ReplyReader(marks, thinking)
    pieces = [piece for part in parts for piece in reply.push(part)] + reply.finish()
    reasoning = content = ""
    calls, ids = [], set()
    for piece in pieces:
        match piece:
            case Reasoning(text):
                assert text and not content and not calls
                reasoning += text
            case Content(text):
                assert text
                content += text
            case CallStart(index, name_id, name):
                assert index == len(calls) and name_id.startswith("call_") and name_id not in ids
                ids.add(name_id)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert text and index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    assert all(arguments for _, arguments in calls)
    return (reasoning, content, calls), reply.finish_reason("stop")


@pytest.mark.parametrize(("text", "thinking", "reasoning", "content", "calls"), GOLDEN)
def test_golden_replies_cut_anywhere(text, thinking, reasoning, content, calls):
    expected = (reasoning, content, calls), "tool_calls" if calls else "stop"
    for form, marks in ((marked(text), MARKS), (text, SPELLED)):
        assert read([form], thinking, marks) == expected
        assert read(form, thinking, marks) == expected  # every character alone
        for i in range(0, len(form), 1 + len(form) // 200):
            assert read([form[:i], form[i:]], thinking, marks) == expected


@pytest.mark.parametrize(("text", "thinking", "reasoning", "content", "calls"), GOLDEN)
def test_golden_replies_byte_by_byte_through_the_decoder(text, thinking, reasoning, content, calls):
    """Each byte is a token, and the tokens of the structure are tokens."""
    ours = tokenizer()
    single = {piece: token for token, piece in enumerate(ours.token_bytes) if len(piece) == 1}
    names = {mark(name): ours.special_ids[name] for name in STRUCTURE}
    ids = []
    for character in marked(text):
        ids += [names[character]] if character in names else [single[bytes([b])] for b in character.encode()]
    decoded = Text(ours, ["never"], spelled={token: text for text, token in names.items()})
    assert read([*(decoded.push([token]) for token in ids), decoded.finish()], thinking)[0] == (
        reasoning,
        content,
        calls,
    )


def test_what_a_model_spells_in_ordinary_tokens_is_text():
    """Also in a string of the arguments, where the whole form of a call stands."""
    assert read([V3_TWO])[0] == ("", V3_TWO, [])
    assert read(["<think>a</think>"])[0] == ("", "<think>a</think>", [])
    arguments = f'{{"code": "{END_CALL}{END_CALLS}{THINK}"}}'
    text = f"{mark(CALL)}f{mark(SEPARATOR)}{arguments}{mark(END_CALL)}"
    assert read([text]) == (("", "", [("f", arguments)]), "tool_calls")


def test_without_marks_all_is_content():
    assert read(["<think>a</think>b ", "c"], marks={}) == (("", "<think>a</think>b c", []), "stop")
    assert read(["a</think>b"], thinking=True, marks={})[0] == ("a</think>b", "", [])


def test_pieces_come_as_soon_as_they_can():
    reply = ReplyReader(MARKS, thinking=False)
    assert reply.push("Hi") == [Content("Hi")]
    assert reply.push(marked(f" there{CALLS}{CALL}get")) == [Content(" there")]
    assert reply.push(marked(f"_time{SEPARATOR}")) == []
    start, arguments = reply.push('{"city"')
    assert start[0] == 0 and start.name == "get_time" and arguments == (0, '{"city"')
    assert reply.push(': "x"') == [CallArguments(0, ': "x"')]
    assert reply.push("}") == [CallArguments(0, "}")]
    assert reply.push(marked(END_CALL)) == reply.finish() == []


def test_the_end_has_openais_word():
    for reason in ("length", "error", "cancelled"):
        reply = ReplyReader(MARKS, thinking=False)
        reply.push(marked(V31))
        assert reply.finish_reason(reason) == reason
        assert reply.finish_reason("stop") == "tool_calls"


PARTS = [*STRUCTURE, "function", "f", "g h", "{", "}", "\n", "```", "```json\n", " ", "é", "<", "x" * MOST_HEADER]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=12), st.booleans(), st.data())
def test_random_replies_never_raise_and_lose_nothing_but_structure(parts, thinking, data):
    text = "".join(parts)
    for form, marks in ((marked(text), MARKS), (text, SPELLED)):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(form)), max_size=6)))
        pieces = [form[a:b] for a, b in zip([0, *cuts], [*cuts, len(form)], strict=True)]
        whole, _ = read([form], thinking, marks)
        assert read(pieces, thinking, marks)[0] == read(form, thinking, marks)[0] == whole
        if CALL not in text:
            assert bare(whole[0] + whole[1]) == bare(text) and not whole[2]
        if not any(name in text for name in STRUCTURE):
            assert whole[:2] == ((text.lstrip("\n"), "") if thinking else ("", text))


def bare(text):
    """Return a text without structure and blanks."""
    for name in STRUCTURE:
        text = text.replace(name, "")
    return "".join(text.split())
