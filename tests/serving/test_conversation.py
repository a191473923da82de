"""Messages and tools as clients write them."""

import pytest

from deepseek_jax.serving.conversation import read_choice, read_messages

USER = {"role": "user", "content": "hi"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g-1.x")]


def test_messages_in_the_form_of_templates():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = read_messages(
        [
            {"role": "developer", "content": parts, "name": "n", "cache_control": {}},
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}], "refusal": None},
            {"role": "assistant", "content": "x", "tool_calls": None, "reasoning_content": "r"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]},
            {"role": "assistant", "content": None, "refusal": "no"},
        ]
    )
    assert found == [
        {"role": "system", "content": "ab", "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "x", "reasoning_content": "r"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}],
        },
        {"role": "assistant", "content": ""},
    ]


def test_results_come_in_the_order_of_their_calls():
    def result(call):
        return {"role": "tool", "content": f"of {call}", "tool_call_id": call}

    calls = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": i} for i in "abc"]}
    rounds = [USER, calls, result("c"), result("a"), result("b"), calls, result("b"), result("a")]
    order = [message.get("tool_call_id") for message in read_messages(rounds)]
    assert order == [None, None, "a", "b", "c", None, "a", "b"]
    unknown = [USER, calls, result("c"), result("x"), result("a")]
    assert [message.get("tool_call_id") for message in read_messages(unknown)][2:] == ["c", "x", "a"]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (None, "messages is null; give a list"),
        ([], "at least one message"),
        (["hi"], r"messages\[0\] is \"hi\"; it must be an object"),
        ([USER, {"role": "bot", "content": ""}], r"messages\[1\].role is \"bot\"; roles are system, developer"),
        ([{"role": ["user"]}], r"role is \[\"user\"\]"),
        ([{"role": "user"}], r"messages\[0\].content is null; it must be a text"),
        ([{"role": "assistant", "content": None}], "content is null"),
        ([{"role": "tool", "content": None}], "content is null"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is \"image_url\"; .*type text only"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is \"x\""),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content has half of a character at 1"),
        ([{"role": "assistant", "tool_calls": "x"}], 'tool_calls is "x"; it must be a list'),
        ([{"role": "assistant", "tool_calls": [1]}], r"tool_calls\[0\] is 1; it must have a function"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}], "arguments is 3"),
    ],
)
def test_wrong_messages_are_refused(messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_messages(messages)


def test_which_tools_may_be_called():
    assert read_choice(None, None, True) == ("none", [], True, [])
    assert read_choice([], "auto", True) == ("none", [], True, [])
    assert read_choice(TOOLS, None, True) == read_choice(TOOLS, "auto", True) == ("auto", TOOLS, True, TOOLS)
    assert read_choice(TOOLS, "none", True) == ("none", [], True, [])
    assert read_choice(TOOLS, "required", False) == ("required", TOOLS, False, TOOLS)
    named = {"type": "function", "function": {"name": "g-1.x"}}
    assert read_choice(TOOLS, named, True) == ("required", TOOLS[1:], False, TOOLS[1:])
    for mode in ("auto", "required"):
        some = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}
        assert read_choice(TOOLS, some, True) == (mode, TOOLS[1:], True, TOOLS)


@pytest.mark.parametrize(
    ("tools", "choice", "complaint"),
    [
        ({}, None, "tools is {}; it must be a list"),
        ([1], None, r"tools\[0\] is 1; it must have the type \"function\""),
        ([{"type": "web_search"}], None, 'type "function"'),
        ([{"type": "function", "function": {"name": "a b"}}], None, r"tools\[0\].function.name is \"a b\""),
        ([{"type": "function", "function": {"name": "x\n"}}], None, "function.name is"),
        ([TOOLS[0], TOOLS[0]], None, r"tools\[1\].function.name is \"f\", as that of another"),
        ([{"type": "function", "function": {"name": "f", "parameters": 1}}], None, "parameters is 1"),
        ([{"type": "function", "function": {"name": "f", "description": 1}}], None, "description is 1"),
        (TOOLS * 300, None, "there are 600 tools"),
        (None, "required", 'tool_choice is "required", and there are no tools'),
        (TOOLS, "any", 'tool_choice is "any"; give'),
        (TOOLS, {"type": "allowed_tools"}, 'allowed_tools is null; give {"mode": "auto" or "required"'),
        (TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": TOOLS}}, "allowed_tools is"),
        (TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "allowed_tools is"),
        (TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [5]}}, "tool_choice is 5"),
        (
            TOOLS,
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": ["f"]}}]}},
            r'names \["f"\], which is none',
        ),
        (TOOLS, {"type": "function", "function": {"name": "h"}}, 'tool_choice names "h", which is none of the tools'),
        (None, {"type": "function", "function": {"name": "f"}}, "none of the tools"),
    ],
)
def test_wrong_tools_are_refused(tools, choice, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_choice(tools, choice, True)
