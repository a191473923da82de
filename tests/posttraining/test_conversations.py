"""What of a conversation is learned: replies and their end tokens, by any template, and nothing else."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import BOS, EOS, PAD, Tokenizer
from deepseek_jax.posttraining.conversations import PLAIN, TEMPLATES, encode_conversation, find_template

TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<|im_start|>", "<|im_end|>")
CHATML = ChatTemplate(
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12).map(lambda text: f"a{text}")


def make_tokenizer() -> Tokenizer:
    """Bytes, and the tokens of turns and reasoning."""
    encoder = tokenizers.Tokenizer.from_str(byte_tokenizer()._content)
    encoder.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in TOKENS])
    return Tokenizer(encoder, BOS, EOS, PAD)


TOKENIZER = make_tokenizer()
ID = TOKENIZER.special_ids


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def learned(examples) -> list[str]:
    """The learned text of each example, with special tokens written out."""
    names = {token_id: name for name, token_id in ID.items()}
    texts = []
    for example in examples:
        ids = example.ids[example.weights]
        texts.append("".join(names.get(i) or TOKENIZER.token_bytes[i].decode("latin-1") for i in ids.tolist()))
    return texts


@st.composite
def conversations(draw):
    """Any order of roles behind the first user's turn, with at least one reply."""
    roles = draw(st.lists(st.sampled_from(("user", "assistant")), max_size=6))
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for role in ["user", *roles, "assistant", *(["user"] if draw(st.booleans()) else [])]:
        text = draw(TEXTS)
        if role == "assistant" and draw(st.booleans()):
            text = f"<think>\n{draw(TEXTS)}\n</think>\n\n{text}"
        messages.append({"role": role, "content": text})
    return messages


@pytest.mark.parametrize(("template", "end"), [("v3", EOS), ("r1", EOS), ("chatml", "<|im_end|>"), ("plain", EOS)])
@settings(max_examples=20, deadline=None)
@given(messages=conversations())
def test_as_many_end_tokens_are_learned_as_there_are_replies(template, end, messages):
    """Each reply is learned once, behind the very prompt that inference would give, and nothing else is."""
    form = TEMPLATES.get(template, CHATML)
    examples = encode_conversation(form, TOKENIZER, messages)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert sum((e.ids[e.weights] == ID[end]).sum() for e in examples) == len(replies)
    rows = [(e.ids.tolist(), e.weights) for e in examples]
    spans = []  # of each reply: example, start, end
    for row, (_, weights) in enumerate(rows):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights.astype(int), [0]]))).reshape(-1, 2)
        spans += [(row, *edge) for edge in edges.tolist()]
    assert len(spans) == len(replies)
    for (row, start, stop), i in zip(spans, replies, strict=True):
        ids = rows[row][0]
        assert ids[:start] == form.encode(TOKENIZER, messages[:i])
        said = TOKENIZER.decode(ids[start : stop - 1])
        assert said.rpartition("</think>")[2].strip() == messages[i]["content"].rpartition("</think>")[2].strip()
        assert ids[stop - 1] == ID[end]


def test_turns_share_an_example_where_the_prompt_goes_on():
    messages = [user("hi"), assistant("yo"), user("bye"), assistant("cu"), user("and?")]
    assert learned(encode_conversation(TEMPLATES["v3"], TOKENIZER, messages)) == [f"yo{EOS}cu{EOS}"]
    (example,) = encode_conversation(PLAIN, TOKENIZER, messages)
    assert example.ids[0] == TOKENIZER.bos and example.ids[-1] == TOKENIZER.eos


@pytest.mark.parametrize(("form", "think"), [("v3", False), ("plain", False), ("v3", True), ("r1", True)])
def test_a_reply_of_weight_0_is_context(form, think):
    """What is learned behind it is conditioned on what inference would give; weights of other roles say nothing."""
    thought = "<think>t</think>" if think else ""
    messages = [
        {**user("hi"), "weight": 0},
        assistant(f"{thought}yo", weight=0),
        {**user("bye"), "weight": 0},
        assistant(f"{thought}cu", weight=1),
        user("so"),
        assistant("no", weight=0),
    ]
    (example,) = encode_conversation(TEMPLATES[form], TOKENIZER, messages)
    assert learned([example]) == [f"{'t</think>' if form == 'r1' else thought}cu{EOS}"]
    start = np.argmax(example.weights)
    assert example.ids[:start].tolist() == TEMPLATES[form].encode(TOKENIZER, messages[:3])


def test_r1_learns_each_reasoning_where_it_is_the_last_turn():
    """Its template drops the reasoning of earlier replies, and opens every reply with <think>."""
    messages = [user("1+1?"), assistant("<think>\neasy\n</think>\n\n2"), user("sure?"), assistant("Yes")]
    first, second = encode_conversation(TEMPLATES["r1"], TOKENIZER, messages)
    assert learned([first, second]) == [f"easy\n</think>\n\n2{EOS}", f"\n</think>\n\nYes{EOS}"]
    assert ID["</think>"] not in second.ids[~second.weights]  # the earlier answer without its reasoning
    assert first.ids[: -first.weights.sum()].tolist()[-2:] == [ID["<think>"], *TOKENIZER.encode("\n")]


def test_only_the_assistant_writes_reasoning_tokens():
    messages = [user("<think>no</think>"), assistant("<think>yes</think>ok<｜User｜>")]
    (example,) = encode_conversation(TEMPLATES["v3"], TOKENIZER, messages)
    special = [i for i in example.ids.tolist() if i in ID.values()]
    assert [i in (ID["<think>"], ID["</think>"]) for i in special] == [False] * 3 + [True] * 2 + [False]
    assert special.count(ID["<｜User｜>"]) == 1  # the template's own


def test_what_follows_an_end_token_is_read_and_not_learned():
    (example,) = encode_conversation(CHATML, TOKENIZER, [user("q"), assistant("a")])
    assert learned([example]) == ["a<|im_end|>"]
    assert example.ids[-1] == TOKENIZER.encode("\n")[0] and not example.weights[-1]


def test_a_reply_of_calls_ends_too():
    tool = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    shared = make_tokenizer()
    names = ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end", "output▁begin", "output▁end")
    more = [f"<｜tool▁{name}｜>" for name in (*names, "outputs▁begin", "outputs▁end")]
    encoder = tokenizers.Tokenizer.from_str(shared._content)
    encoder.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in more])
    tokenizer = Tokenizer(encoder, BOS, EOS, PAD)
    messages = [user("q"), assistant(None, tool_calls=[tool]), {"role": "tool", "content": "r"}, assistant("done")]
    (example,) = encode_conversation(TEMPLATES["v3"], tokenizer, messages)
    assert (example.ids[example.weights] == tokenizer.eos).sum() == 2
    assert TOKENIZER.encode("r")[0] not in example.ids[example.weights][-5:]  # the result is not learned


ENDLESS = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
TURNED = ChatTemplate("{{ bos_token }}{% for m in messages | reverse %}{{ m.content + eos_token }}{% endfor %}")
REFUSES = ChatTemplate("{{ raise_exception('only one turn') }}")


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (PLAIN, [user("q")], "no message is the assistant's"),
        (PLAIN, [user("q"), {"role": "robot", "content": "a"}], "messages.1. has role 'robot'; roles are"),
        (PLAIN, [user("q"), assistant(" \n")], "messages.1. of the assistant is empty"),
        (PLAIN, [user(""), assistant("a")], "messages.0. of the user is empty"),
        (PLAIN, [user("q"), assistant(None)], "messages.1. has content None"),
        (PLAIN, [assistant("a")], "nothing comes before it"),
        (PLAIN, [], "at least one message"),
        (PLAIN, [user("q"), {"role": "tool", "content": "r"}, assistant("a")], "the plain template has no role tool"),
        (PLAIN, [user("q"), assistant(None, tool_calls=[{"id": "c"}])], "messages.1. has tool_calls, and the chat"),
        (TEMPLATES["r1"], [user("q"), assistant("a", reasoning_content="t")], "write it into the content, as <think>"),
        (PLAIN, [user("q"), assistant("a", weight=0.5)], "messages.1. has weight = 0.5, and a reply is learned or not"),
        (PLAIN, [user("q"), assistant("a", weight=0)], "or each has the weight 0, so there is nothing to learn"),
        (ENDLESS, [user("q"), assistant("a")], "ends messages.1. without a special token"),
        (TURNED, [user("q"), assistant("a")], "in another way than it opens a reply"),
        (REFUSES, [user("q"), assistant("a")], "cannot render these messages: only one turn"),
        (TEMPLATES["v3.1"], [user("q"), assistant("<think>t</think>a")], "let it open the reasoning"),
    ],
)
def test_what_cannot_be_learned_is_refused(template, messages, words):
    with pytest.raises(ValueError, match=words):
        encode_conversation(template, TOKENIZER, messages)


def test_tools_that_the_template_does_not_read_are_refused():
    messages = [user("q"), assistant("a", weight=1, reasoning_content=None)]
    assert learned(encode_conversation(PLAIN, TOKENIZER, messages, tools=None)) == [f"a{EOS}"]
    with pytest.raises(ValueError, match="there are tools, and the chat template does not read them"):
        encode_conversation(PLAIN, TOKENIZER, messages, tools=[{"type": "function"}])


def test_v31_thinks_where_it_is_told_to():
    messages = [user("q"), assistant("<think>t</think>a")]
    assert learned(encode_conversation(TEMPLATES["v3.1"], TOKENIZER, messages, thinking=True)) == [f"t</think>a{EOS}"]


def test_templates_are_found_by_name_and_by_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}", "utf-8")
    assert find_template("folder", tmp_path).source == find_template(str(tmp_path / "chat_template.jinja"), None).source
    with pytest.raises(ValueError, match="'v4' is not a template; give one of v3, r1, v3.1, plain"):
        find_template("v4", None)
    with pytest.raises(ValueError, match="needs weights from a folder"):
        find_template("folder", None)
    (tmp_path / "broken.jinja").write_text("{% if %}", "utf-8")
    with pytest.raises(ValueError, match="broken.jinja.*not valid Jinja"):
        find_template(str(tmp_path / "broken.jinja"), None)
