"""Conversations from files: every form, one split, and a message with file and line for what cannot be used."""

import gzip
import importlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs import tiny_sft
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.documents import CorpusError
from deepseek_jax.posttraining.chats import HeldOutChats, read_chats, rows_per_epoch
from deepseek_jax.posttraining.conversations import PLAIN
from deepseek_jax.posttraining.settings import read
from deepseek_jax.schedule import schedule_value

TOKENIZER = byte_tokenizer()


def chat(number: int, answer: str = "yes") -> dict:
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]}


def data(*paths, **changes):
    tree = tiny_sft.get_config()
    tree.training.initial_weights = "W"
    tree.data.update({"sources": tuple({"path": str(path)} for path in paths), "heldout_fraction": 0.0} | changes)
    return read(tree)[0].data


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def ids(chats):
    return [example.ids.tolist() for example in chats.train]


def test_every_form_of_a_file_gives_the_same_conversations(tmp_path):
    records = [chat(i) for i in range(5)]
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "d.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "e.parquet")
    read_all = [ids(read_chats(data(path), PLAIN, TOKENIZER)) for path in sorted(tmp_path.iterdir())]
    assert len(read_all) == 5 and all(found == read_all[0] for found in read_all) and len(read_all[0]) == 5
    assert len(ids(read_chats(data(tmp_path), PLAIN, TOKENIZER))) == 20  # beside tables a .json may be anything


def test_a_table_gives_no_tool_the_parameters_of_another(tmp_path):
    """All objects of a column have the same fields; in JSON lines an empty one was written by somebody."""

    def tool(name, **parameters):
        call = {"id": name, "function": {"name": name, "arguments": "{}"}}
        turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
        messages = chat(1)["messages"]
        tools = [{"function": {"name": name, "parameters": {"properties": parameters}}}]
        return {"messages": [messages[0], *turns, messages[1]], "tools": tools}

    template = ChatTemplate(
        "{{ tools | tojson }}{% for m in messages %}{{ m.tool_calls | tojson if m.content is none else m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    records = [tool("f", city={"type": "string"}), tool("g", content={"enum": ["a", "b"]})]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    lines = write(tmp_path / "b.jsonl", records)
    found = [ids(read_chats(data(path), template, TOKENIZER)) for path in (tmp_path / "a.parquet", lines)]
    assert found[0] == found[1]
    empty = write(tmp_path / "c.jsonl", [tool("f", city=None)])
    assert '"city": null' in TOKENIZER.decode(ids(read_chats(data(empty), template, TOKENIZER))[0])


BAD = {
    '{"messages": [': "line 2 is not JSON text",
    "[1]": "line 2 is a list; make it an object",
    '{"text": "x"}': "line 2 has no list of messages under 'messages' .it has ..text...; name their field",
    '{"messages": null}': "line 2 has None under 'messages', not a list of messages; make it one",
    json.dumps({"messages": "[]"}): "line 2 has '..' under 'messages', not a list of messages; make it one",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "line 2 is not text",
    json.dumps({"messages": [{"role": "user", "content": "q"}]}): "line 2: no message is the assistant's",
    json.dumps({"messages": [{"role": "cook", "content": "q"}]}): "line 2: messages.0. has role 'cook'",
    json.dumps({"messages": ["q"]}): "line 2: messages.0. = 'q' must be a mapping",
    json.dumps(chat(2, "")): "line 2: messages.1. of the assistant is empty",
    json.dumps(chat(2, "y" * 300)): "line 2 has 323 tokens, and data.sequence_length = 256 holds 257; raise it",
    json.dumps(chat(2) | {"chat_template_kwargs": {"messages": 3}}): "line 2: ",
    json.dumps(chat(2) | {"chat_template_kwargs": "thinking"}): "line 2 has chat_template_kwargs = .*make it an object",
    json.dumps(chat(2) | {"chat_template_kwargs": 3}): "line 2 has chat_template_kwargs = .*make it an object",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_what_cannot_be_used_is_named_with_file_and_line_or_left_out(tmp_path, line):
    path = write(tmp_path / "chats.jsonl", [chat(1), line, chat(3)])
    with pytest.raises(CorpusError, match=rf"chats.jsonl {BAD[line]}.*data.on_error = 'skip'"):
        read_chats(data(path), PLAIN, TOKENIZER)
    assert len(read_chats(data(path, on_error="skip"), PLAIN, TOKENIZER).train) == 2


def test_sources_without_conversations_are_refused(tmp_path):
    path = write(tmp_path / "chats.jsonl", ["{}"])
    with pytest.raises(ValueError, match="no conversation to train on; the first of 1 that cannot be used: .*line 1"):
        read_chats(data(path, on_error="skip"), PLAIN, TOKENIZER)
    with pytest.raises(CorpusError, match=r"a.txt holds text without fields; make .jsonl or .parquet"):
        read_chats(data(write(tmp_path / "a.txt", ["x"])), PLAIN, TOKENIZER)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(CorpusError, match="b.parquet cannot be read"):
        read_chats(data(tmp_path / "b.parquet"), PLAIN, TOKENIZER)
    with pytest.raises(CorpusError, match="download its .parquet"):
        read_chats(data("hf:owner/name"), PLAIN, TOKENIZER)


def test_all_answers_to_one_question_are_on_one_side(tmp_path):
    path = write(tmp_path / "chats.jsonl", [chat(i % 50, f"yes {i}") for i in range(200)])
    chats = read_chats(data(path, heldout_fraction=0.3), PLAIN, TOKENIZER)

    def questions(examples):
        return {TOKENIZER.decode(e.ids[~e.weights].tolist()) for e in examples}

    assert not questions(chats.train) & questions(chats.heldout)
    assert len(questions(chats.train)) + len(questions(chats.heldout)) == 50
    assert chats.num_conversations == 200 and 20 < chats.num_heldout < 100
    few = read_chats(data(write(tmp_path / "few.jsonl", map(chat, range(2))), heldout_fraction=0.01), PLAIN, TOKENIZER)
    assert len(few.train) == len(few.heldout) == 1
    with pytest.raises(ValueError, match="all 3 conversations begin alike"):
        read_chats(data(write(tmp_path / "c.jsonl", [chat(1)] * 3), heldout_fraction=0.1), PLAIN, TOKENIZER)


def test_a_question_is_on_one_side_whatever_file_it_is_in(tmp_path):
    """A table adds empty fields, which do not make another question."""
    lines = [chat(i, "lines") for i in range(30)]
    table = [{"messages": [m | {"name": None} for m in chat(i, "table")["messages"]]} for i in range(30)]
    paths = write(tmp_path / "a.jsonl", lines), write(tmp_path / "b.jsonl", table)
    chats = read_chats(data(*paths, heldout_fraction=0.3), PLAIN, TOKENIZER)
    sides = [{TOKENIZER.decode(e.ids[~e.weights].tolist()) for e in side} for side in (chats.train, chats.heldout)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30 and sides[1]


def test_held_out_batches_have_each_conversation_once_on_any_number_of_processes(tmp_path):
    path = write(tmp_path / "chats.jsonl", [chat(i, "y" * (i % 60 + 1)) for i in range(90)])
    settings = data(path)
    examples = read_chats(settings, PLAIN, TOKENIZER).train
    learned = sum(int(example.weights.sum()) for example in examples)

    def batches(process_index, process_count):
        return HeldOutChats(settings, TOKENIZER.pad, examples, 8, 99, process_index, process_count)

    alone, parts = list(batches(0, 1)), [list(batches(p, 2)) for p in range(2)]
    assert sum(batch["loss_weights_BS"].sum() for batch in alone) == learned
    for whole, *halves in zip(alone, *parts, strict=True):
        for name, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))
    assert len(HeldOutChats(settings, TOKENIZER.pad, examples, 8, 1)) == 1
    assert -(-rows_per_epoch(examples, settings.sequence_length) // 8) == len(alone)


@pytest.mark.parametrize(
    ("name", "template", "rate", "last", "length"),
    [
        ("tiny_sft", "plain", 3e-4, 6e-5, 256),
        ("deepseek_v3_sft", "v3", 5e-6, 1e-6, 8192),  # arXiv 2412.19437, section 5.1; the length is ours
        ("deepseek_r1_sft", "r1", 5e-6, 5e-7, 32768),  # arXiv 2501.12948v2
    ],
)
def test_configs_say_what_is_published(name, template, rate, last, length):
    tree = importlib.import_module(f"configs.{name}").get_config()
    tree.training.initial_weights = "W"
    config, posttraining = read(tree)
    assert (config.name, posttraining.sft.template, posttraining.sft.epochs) == (name, template, 2.0)
    values = [schedule_value(config.optimizer.learning_rate, at) for at in (0.0, 0.5, 1.0)]
    assert values == pytest.approx([rate, (rate + last) / 2, last], rel=1e-6)
    assert config.data.sequence_length == length
    assert schedule_value(config.optimizer.bias_update_rate, 0.5) == 0.0
    with pytest.raises(ValueError, match="this configuration is for experiments.posttrain"):
        from_config_dict(tree)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"posttraining": None}, "has no section 'posttraining'; begin with configs/tiny_sft.py"),
        ({"posttraining.stage": "sfft"}, r"stage = 'sfft' is unknown; choose one of"),
        ({"posttraining.sft": {"template": "v3", "epoch": 2.0, "mtp": "off"}}, "did you mean 'epochs'"),
        ({"posttraining.sft": {"template": "v3", "mtp": "off"}}, r"config.posttraining.sft lacks \['epochs'\]"),
        ({"posttraining": {"stage": "sft"}}, r"settings of \[\] and stage = 'sft'"),
        ({"posttraining.sft.epochs": 0.0}, "epochs = 0.0 must be a positive number"),
        ({"posttraining.sft.epochs": "2"}, "is a str; it must be a float"),
        ({"posttraining.sft.mtp": "on"}, "mtp = 'on' is unknown; choose one of"),
        ({"model.num_mtp_layers": 0}, "has no MTP layers; set it to 'off'"),
        ({"posttraining.sft.mtp": "off", "optimizer.weight_decay": 0.1}, "would shrink MTP layers"),
        ({"posttraining.sft.mtp": "detached", "mesh.pipe": 2}, "'detached' with config.mesh.pipe = 2 is not tested"),
        ({"posttraining.sft.template": ""}, "template is empty"),
        ({"data.mask_documents": False}, "would let packed conversations see each other"),
        ({"data.reset_positions": False}, "would let packed conversations see each other"),
        ({"data.fim_rate": 0.1}, "is for texts, not conversations"),
        ({"data.heldout_fraction": 1.0}, "leaves nothing to train on"),
        ({"data.sources": ({"path": "a", "weight": 2.0},)}, "'a' has a weight"),
        ({"training.initial_weights": ""}, "begins with weights: give --initial"),
        ({"training.initial_weights": "state:W"}, "name the weights alone, without 'state:'"),
    ],
)
def test_settings_are_read_strictly(changes, words):
    tree = tiny_sft.get_config().to_dict()
    tree["training"]["initial_weights"] = "W"
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[key] = value
        if value is None:
            del section[key]
    with pytest.raises(ValueError, match=words):
        read(tree)
