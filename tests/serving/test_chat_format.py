"""From a request to a prompt, a grammar and how the reply is read."""

import copy
import functools
import json
import re

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.deepseek_chat import R1, V3, V3_1
from deepseek_jax.inference.text import Text
from deepseek_jax.serving.chat_format import ChatFormat, open_chat_format, recognised
from deepseek_jax.serving.reply import Content, Reasoning
from deepseek_jax.serving.tool_calls import CallArguments, CallStart
from tests.support.masks import allowed, refused
from tests.support.released import folder, tokenizer

V = 129_280
USER = [{"role": "user", "content": "hi"}]
F = {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"]}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": F}},
    {"type": "function", "function": {"name": "foo"}},
]
ONE = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"x": "a"}\n```<｜tool▁call▁end｜>'
TWO = ONE + '\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>foo\n```json\n{"y": ["```"]}\n```<｜tool▁call▁end｜>'
END = "<｜tool▁calls▁end｜>"
CALL31 = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": "a"}<｜tool▁call▁end｜>'
INTEGERS = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "array", "items": {"type": "integer"}}},
}


@pytest.fixture(scope="module")
def formats():
    return {name: open_chat_format(None, tokenizer(), vocab_size=V, name=name) for name in ("v3", "r1", "v3.1")}


def named(name, parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def fits(chat, text):
    return refused(chat.grammar, tokenizer(), text, V) is None


def text_of(chat):
    names = {i: name for name, i in tokenizer().special_ids.items()}
    pieces = tokenizer().token_bytes
    return b"".join(names[i].encode() if i in names else pieces[i] for i in chat.prompt).decode()


def test_formats_are_recognised_by_what_templates_write():
    assert [recognised(template) for template in (V3, R1, V3_1)] == ["v3", "r1", "v3.1"]
    assert recognised(ChatTemplate("{{ messages[0].content }}")) == "other"
    released = ChatTemplate.load(folder())
    assert recognised(released) == "r1"
    old = re.sub(r"\{% set content = message\['content'\].*?\{% endif %\}", "", released.source)
    assert "think" not in old and recognised(ChatTemplate(old)) == "v3"


def test_a_folder_a_name_a_file_or_nothing(tmp_path):
    rest = {"vocab_size": V}
    assert open_chat_format(None, tokenizer(), **rest) is None
    assert open_chat_format(tmp_path, tokenizer(), **rest) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert open_chat_format(tmp_path, tokenizer(), **rest) is None
    assert open_chat_format(folder(), tokenizer(), **rest).name == "r1"
    named = open_chat_format(folder(), tokenizer(), name="v3.1", **rest)
    assert named.name == "v3.1" and text_of(named.prepare(USER)).endswith("<｜Assistant｜></think>")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    mine = open_chat_format(None, tokenizer(), name=str(file), **rest)
    assert mine.name == "other" and mine.prepare(USER).prompt == [0, *tokenizer().encode("hi"), 1]
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    for name, complaint in (
        (None, "not valid Jinja"),
        ("v4", "neither a file with a chat template nor a chat format; the formats are v3, r1, v3.1"),
        ("gs://x", "gs://"),
    ):
        with pytest.raises(ValueError, match=complaint):
            open_chat_format(tmp_path, tokenizer(), name=name, **rest)
    with pytest.raises(ValueError, match="the tokenizer has no token '<｜User｜>', which the chat format v3 writes"):
        open_chat_format(None, byte_tokenizer(), vocab_size=300, name="v3")
    with pytest.raises(ValueError, match="no chat template; name a format"):
        ChatFormat(tokenizer(), None, vocab_size=V)


def test_the_folders_template_is_used_where_it_can(formats):
    released = open_chat_format(folder(), tokenizer(), vocab_size=V)
    plain = [{"role": "system", "content": "S"}, *USER, {"role": "assistant", "content": "a"}, *USER]
    assert text_of(released.prepare(plain)) == ChatTemplate.load(folder()).render(plain)
    with_tools = text_of(released.prepare(USER, tools=TOOLS))
    assert '{"name": "f"' in with_tools and with_tools.endswith("<｜Assistant｜>")
    assert text_of(released.prepare(USER, tools=TOOLS, tool_choice="none")) == text_of(released.prepare(USER))
    assert text_of(formats["r1"].prepare(USER, tools=TOOLS)) == with_tools + "<think>\n"
    source = V3.source.replace("You can call these functions", "Mine")
    assert "Mine" in text_of(ChatFormat(tokenizer(), ChatTemplate(source), vocab_size=V).prepare(USER, tools=TOOLS))


@pytest.mark.parametrize(
    ("write", "expected"),
    [("arguments", '{"x": "é"}'), ("arguments | tojson", '{"x": "é"}'), ("arguments.items() | list", "[('x', 'é')]")],
)
def test_arguments_are_as_the_template_wants_them(write, expected):
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<｜tool▁sep｜>' ~ (c.function."
        + write
        + ") }}{% endfor %}{% endfor %}{{ tools }}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    chat = ChatFormat(tokenizer(), ChatTemplate(source), vocab_size=V).prepare(
        [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    assert text_of(chat) == f"hi<｜tool▁sep｜>{expected}None"


def test_reasoning_is_open_where_the_prompt_ends_so(formats):
    thinking = {"thinking": True}
    result = [
        *USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "1"},
    ]
    released = open_chat_format(folder(), tokenizer(), vocab_size=V)
    for chat, piece in (
        (formats["r1"].prepare(USER), Reasoning),
        (formats["r1"].prepare(result), Content),  # behind results the format opens none
        (formats["v3"].prepare([{"role": "user", "content": "<think>"}]), Content),
        (formats["v3.1"].prepare(USER), Content),
        (formats["v3.1"].prepare(USER, variables=thinking), Reasoning),
        (formats["v3.1"].prepare(result, variables=thinking), Content),
        (released.prepare(USER), Content),
    ):
        assert chat.reader().push("x") == [piece("x")]
        assert set(map(tokenizer().special_ids.get, ("<think>", "</think>"))) == chat.spelled.keys()


def test_a_tokenizer_without_think_tokens_reads_them_as_text():
    ours = byte_tokenizer()
    template = ChatTemplate("{{ messages[0].content.split('</think>')[-1] }}")
    chat = ChatFormat(ours, template, vocab_size=300).prepare(USER)
    assert chat.spelled == {} and bytes(ours.decode_bytes(chat.prompt)) == b"hi"
    reply = chat.reader()
    assert reply.push("<thi") + reply.push("nk>a</thin") + reply.push("k>b") == [Reasoning("a"), Content("b")]


def test_required_calls_in_v3s_form(formats):
    any_tool = formats["v3"].prepare(USER, tools=TOOLS, tool_choice="required")
    assert fits(any_tool, ONE + END) and fits(any_tool, TWO + END)
    for text in ("text", ONE, ONE.replace('"a"', '"c"') + END, ONE.replace("f\n", "g\n") + END, END):
        assert not fits(any_tool, text)
    single = formats["v3"].prepare(USER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert fits(single, ONE + END) and not fits(single, TWO + END)
    named = {"type": "function", "function": {"name": "f"}}
    only = formats["v3"].prepare(USER, tools=TOOLS, tool_choice=named)
    assert fits(only, ONE + END) and not fits(only, ONE.replace("f\n", "foo\n") + END) and not fits(only, TWO + END)


def test_required_calls_behind_reasoning_and_in_v31s_form(formats):
    thinks = formats["r1"].prepare(USER, tools=TOOLS, tool_choice="required")
    assert fits(thinks, "hm {\n</think>\n\n" + ONE + END) and fits(thinks, "</think>" + ONE + END)
    assert not fits(thinks, ONE + END) and not fits(thinks, "hm") and not fits(thinks, "hm</think>text")
    newer = formats["v3.1"].prepare(USER, tools=TOOLS, tool_choice="required")
    assert fits(newer, f"<｜tool▁calls▁begin｜>{CALL31}{CALL31}{END}") and not fits(newer, ONE + END)


@pytest.mark.parametrize("name", ["v3", "r1", "v3.1"])
def test_what_is_drawn_from_the_masks_is_read_as_calls(formats, name):
    """From the grammar through the decoder to the reply: a model that draws at random makes calls that fit."""
    strict = [
        tool | {"function": tool["function"] | {"parameters": F | {"additionalProperties": False}}} for tool in TOOLS
    ]
    chat = formats[name].prepare(USER, tools=strict, tool_choice="required")
    rng, ids = np.random.default_rng(0), tokenizer().special_ids
    for _ in range(3):
        grammar, reply, text = chat.grammar(), chat.reader(), Text(tokenizer(), spelled=chat.spelled)
        pieces, count = [], 0
        while text.reason is None:
            may, count = allowed(grammar, V), count + 1
            ends = [token for token in (1, ids["</think>"], ids["<｜tool▁calls▁end｜>"]) if token in may]
            token = ends[0] if ends and count > 20 else int(rng.choice(may))
            grammar.accept(token)
            pieces += reply.push(text.push([token]))
        pieces += reply.finish()
        starts = [piece for piece in pieces if isinstance(piece, CallStart)]
        arguments = [""] * len(starts)
        for piece in pieces:
            if isinstance(piece, CallArguments):
                arguments[piece[0]] += piece.text
        assert starts and not any(isinstance(piece, Content) for piece in pieces)
        assert {start.name for start in starts} <= {"f", "foo"} and len({start.id for start in starts}) == len(starts)
        assert all(json.loads(made)["x"] in ("a", "b") for made in arguments)
        assert any(isinstance(piece, Reasoning) for piece in pieces) == (name == "r1")
        assert reply.finish_reason(text.reason) == "tool_calls"


def test_response_formats(formats):
    assert formats["v3"].prepare(USER).grammar is formats["v3"].prepare(USER, response_format={"type": "text"}).grammar
    some = formats["v3"].prepare(USER, response_format={"type": "json_object"})
    assert fits(some, '{"a": 1}') and not fits(some, "[1]") and not fits(some, "<think>x</think>{}")
    numbers = formats["v3.1"].prepare(USER, response_format=INTEGERS)
    assert fits(numbers, "[1, 2]") and not fits(numbers, '["x"]')
    for chat in (
        formats["v3.1"].prepare(USER, response_format=INTEGERS, variables={"thinking": True}),
        formats["r1"].prepare(USER, response_format=INTEGERS),
    ):
        assert fits(chat, "so [\n</think>\n\n[1]") and fits(chat, "</think>[1]")
        assert not fits(chat, "[1]") and not fits(chat, "</think>\n\n\n\n\n\n[1]")
    # R1-0528 opens its reasoning itself, or does not
    chat = open_chat_format(folder(), tokenizer(), vocab_size=V).prepare(USER, response_format=INTEGERS)
    assert fits(chat, "<think>\nx</think>\n\n[1]") and fits(chat, "[1]") and not fits(chat, "<think>[1]")


def test_what_comes_while_a_model_thinks_can_be_rolled_back(formats):
    grammar = formats["r1"].prepare(USER, response_format=INTEGERS).grammar()
    end, breaks, bracket = tokenizer().special_ids["</think>"], *map(tokenizer().encode, ("\n\n", "["))
    free = allowed(grammar, V).tolist()
    assert end in free and len(free) > 127_000 and not {0, 1, 2, 128_804} & set(free)
    for ids in ([5, end], [5, end, *breaks], [5, end, *breaks, *bracket], [end, *bracket, *bracket]):
        for token in ids[:-1]:
            grammar.accept(token)
        before = allowed(grammar, V).tolist()
        if ids[-1] in before:
            grammar.accept(ids[-1])
            grammar.rollback(1)
        assert allowed(grammar, V).tolist() == before
        grammar.rollback(len(ids) - 1)
        assert allowed(grammar, V).tolist() == free


def test_tools_and_a_format_together_and_strict_tools(formats):
    both = formats["v3"].prepare(USER, tools=TOOLS, response_format=INTEGERS)
    assert fits(both, "[1]") and fits(both, TWO + END) and not fits(both, "text")
    assert formats["v3"].prepare(USER, tools=TOOLS).grammar is None
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    chat = formats["v3"].prepare(USER, tools=strict)
    wrong = ONE.replace('"a"', '"c"') + END
    assert all(fits(chat, text) for text in ("Any text 👩‍🔬\n", "", "So: " + TWO + END)) and not fits(
        chat, "So: " + wrong
    )
    one = formats["v3"].prepare(USER, tools=TOOLS, parallel_tool_calls=False)
    assert fits(one, "So: " + wrong) and fits(one, "text") and not fits(one, TWO + END)
    foo = ONE.partition("<｜tool▁call▁begin｜>")[0] + TWO.removeprefix(ONE).lstrip() + END
    for mode in ("auto", "required"):
        some = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named("foo", {})]}}
        chat = formats["v3"].prepare(USER, tools=TOOLS, tool_choice=some)
        assert chat.prompt == formats["v3"].prepare(USER, tools=TOOLS).prompt  # which the cache may have
        assert fits(chat, foo) and not fits(chat, ONE + END) and fits(chat, "text") == (mode == "auto")


@pytest.mark.parametrize("name", ["v3", "r1", "v3.1"])
def test_the_last_message_goes_on(formats, name):
    """The prompt ends with it as it stands, blanks included; what comes then is content."""
    begun = {"role": "assistant", "content": "So <｜User｜> is "}
    chat = formats[name].prepare([*USER, begun], continues=True)
    assert text_of(chat) == text_of(formats[name].prepare(USER)).removesuffix("<think>\n") + begun["content"]
    assert tokenizer().special_ids["<｜User｜>"] not in chat.prompt[2:]
    assert chat.reader().push(" it") == [Content(" it")]


@pytest.mark.parametrize(
    ("messages", "more", "complaint"),
    [
        (USER, {}, "the last message is of the role user; end with an answer's beginning"),
        ([*USER, {"role": "assistant", "content": "<think>Hm"}], {}, "not with reasoning; leave <think> out"),
        (
            [*USER, {"role": "assistant", "content": "a"}],
            {"response_format": {"type": "json_object"}},
            "without a form",
        ),
    ],
)
def test_what_cannot_go_on_is_refused(formats, messages, more, complaint):
    with pytest.raises(ValueError, match=complaint):
        formats["v3"].prepare(messages, continues=True, **more)


def test_a_template_that_drops_the_last_message_cannot_go_on():
    chat = ChatFormat(tokenizer(), ChatTemplate("{{ messages[0].content }}"), vocab_size=V)
    with pytest.raises(ValueError, match="does not write the last message as it is"):
        chat.prepare([*USER, {"role": "assistant", "content": "a"}], continues=True)


@pytest.mark.parametrize(
    ("request_fields", "complaint"),
    [
        ({"response_format": {"type": "xml"}}, 'response_format is "xml"; its type must be'),
        ({"response_format": "json_schema"}, "response_format is"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema has no schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": False}}},
            "^response_format.json_schema.schema is false",
        ),
        (
            {"tools": [named("f", {"not": {}})], "tool_choice": "required"},
            r"^tools\[0\].function.parameters cannot be used: Unimplemented",
        ),
        (
            {"tools": [named("f", {"type": "string"})], "tool_choice": "required"},
            "arguments are an object",
        ),
        (
            {"tools": [named(f"f{i}", {"description": "x" * 40_000}) for i in range(8)], "tool_choice": "required"},
            "parameters of tools have more than 262,144 characters; give fewer tools",
        ),
        ({"variables": {"messages": []}}, "variable messages cannot be set"),
    ],
)
def test_wrong_requests_are_refused(formats, request_fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        formats["v3"].prepare(**({"messages": USER} | request_fields))


@pytest.mark.parametrize("field", ["messages", "tools", "tool_choice", "response_format", "variables"])
def test_deep_requests_are_refused(formats, field):
    deep = functools.reduce(lambda inner, _: {"x": inner}, range(50_000), {})
    value = deep if field in ("tool_choice", "variables") else [deep]
    with pytest.raises(ValueError, match="is nested more than 80 levels deep"):
        formats["v3"].prepare(**({"messages": USER} | {field: value}))


def test_a_foreign_template_knows_no_calls():
    other = ChatFormat(tokenizer(), ChatTemplate("{{ messages[0].content }}{{ tools }}"), vocab_size=V)
    assert other.prepare(USER).grammar is None and not other.reads("thinking") and other.reads("tools")
    with pytest.raises(ValueError, match="not known how this model calls tools; .* chat format: v3, r1, v3.1"):
        other.prepare(USER, tools=TOOLS)
    without = copy.copy(tokenizer())
    without.special_ids = {name: i for name, i in without.special_ids.items() if "tool" not in name}
    v3 = ChatFormat(without, None, vocab_size=V, name="v3")
    assert v3.prepare(USER).prompt
    with pytest.raises(ValueError, match="not known how this model calls tools"):
        v3.prepare(USER, tools=TOOLS)


def test_variables_that_templates_read(formats):
    assert formats["v3.1"].reads("thinking") and not formats["v3"].reads("thinking")
    template = ChatTemplate("{% if not effort is defined %}{% set effort = 1 %}{% endif %}{{ messages[0].content }}")
    assert ChatFormat(tokenizer(), template, vocab_size=V).reads("effort")
    assert formats["v3"].template_text == V3.source
