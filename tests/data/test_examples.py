"""Weights belong to their tokens, from a list of prompts and answers to the batches of a loader."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.examples import Example, check_examples
from deepseek_jax.data.packing import next_token_batch, pack
from deepseek_jax.data.pipeline import make_loader, make_train_loader

PAD = -1
TOKENIZER = byte_tokenizer()


def conversation(prompt: str, answer: str) -> Example:
    """A prompt that is read and an answer that is learned, as fine-tuning has them."""
    prompt_ids, answer_ids = [TOKENIZER.bos, *TOKENIZER.encode(prompt)], [*TOKENIZER.encode(answer), TOKENIZER.eos]
    weights = [0] * len(prompt_ids) + [1] * len(answer_ids)
    return Example(np.array(prompt_ids + answer_ids), np.array(weights, np.uint8))


CONVERSATIONS = [conversation(f"{a} + {b} =\n", f" {a + b};\n") for a in range(5, 17) for b in range(1, 400, 37)]


class Encoded:
    """The same, encoded when they are read: a sequence that is not in memory."""

    def __len__(self):
        return len(CONVERSATIONS)

    def __getitem__(self, index):
        return Example(CONVERSATIONS[index].ids.copy(), CONVERSATIONS[index].weights.copy())


@pytest.fixture
def data(make_config):
    return lambda mask: dataclasses.replace(make_config("unused").data, mask_documents=mask)


def numbered(seed: int, dtypes: list[str | None], longest: int = 90) -> list[Example]:
    """Examples of which no two share an id, with weights of these types in turn; b follows a exactly if b = a + 1."""
    rng, examples, start = np.random.default_rng(seed), [], 0
    for i in range(150):
        length, dtype = int(rng.integers(1, longest)), dtypes[i % len(dtypes)]
        weights = rng.integers(0, 4, length) * (0.3 if dtype == "float32" else 1)
        examples.append(Example(np.arange(start, start + length), weights.astype(dtype) if dtype else None))
        start += length + 1
    return examples


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("row_length", [2, 33, 128])
@pytest.mark.parametrize("dtypes", [["uint8"], ["float32"], ["bool", None, "float32", "uint8"]])
def test_weights_stay_with_their_tokens(data, dtypes, row_length, mask):
    """Every target has the weight of its token, whether its document was cut, moved, or shares a row."""
    examples = numbered(0, dtypes)
    weight_of = np.zeros(examples[-1].ids[-1] + 2, np.float32)  # the last, index -1, is the padding's
    for ids, weights in examples:
        weight_of[ids] = 1 if weights is None else weights
    batch = next_token_batch(pack(examples, row_length, PAD), data(mask))
    expected = weight_of[batch["targets_BS"]]
    if mask:
        expected *= batch["targets_BS"] == batch["tokens_BS"] + 1
    assert batch["loss_weights_BS"].dtype == np.float32
    np.testing.assert_array_equal(batch["loss_weights_BS"], expected)
    assert len(np.unique(expected)) > 1


def documents_of(batches) -> list[tuple[bytes, bytes]]:
    """The ids and the weights of the targets of every whole document in masked batches."""
    found = []
    for batch in batches:
        for tokens_S, targets_S, segments_S, weights_S in zip(
            *(batch[f"{name}_BS"] for name in ("tokens", "targets", "segment_ids", "loss_weights")), strict=True
        ):
            for segment in range(1, segments_S.max() + 1):
                here = segments_S == segment
                ends = np.flatnonzero(targets_S[here] == TOKENIZER.eos)
                if len(ends):  # otherwise nothing of the document but EOS is in the row's inputs
                    length = ends[0] + 1
                    ids = np.append(tokens_S[here][0], targets_S[here][:length])
                    found.append((ids.astype(int).tobytes(), weights_S[here][:length].astype(int).tobytes()))
    return found


@pytest.mark.parametrize("examples", [CONVERSATIONS, Encoded()], ids=["list", "lazy"])
def test_a_loader_of_conversations_trains_on_their_answers(make_config, examples):
    """One epoch has every conversation once, whole and in order, whatever the corpus's augmentation is set to."""
    config = make_config("unused", mask_documents=True, fim_rate=1.0, split_rate=1.0)
    loader = make_loader(config, TOKENIZER, examples)
    epochs = []
    for _ in range(2):
        first = loader.next_batch(1)
        epochs.append([first, loader.next_batch(len(loader._window.tokens) - 1)])
    expected = sorted((ids.astype(int).tobytes(), weights[1:].astype(int).tobytes()) for ids, weights in CONVERSATIONS)
    found = [documents_of(epoch) for epoch in epochs]
    assert sorted(found[0]) == sorted(found[1]) == expected
    assert found[0] != found[1]
    batch = epochs[0][1]
    text = TOKENIZER.decode(batch["targets_BS"][batch["loss_weights_BS"] > 0])
    assert "+" not in text and text.count(";") == (batch["targets_BS"] == TOKENIZER.eos).sum()
    loader.close()


def test_a_position_in_other_examples_is_refused(tmp_path, make_config, corpus_folder):
    config = make_config(corpus_folder)
    position = make_loader(config, TOKENIZER, CONVERSATIONS).state()
    learned = Example(CONVERSATIONS[0].ids, np.ones(len(CONVERSATIONS[0].ids), np.uint8))
    with pytest.raises(ValueError, match="another data stream .examples was"):
        make_loader(config, TOKENIZER, [learned, *CONVERSATIONS[1:]]).restore(position)
    with pytest.raises(ValueError, match="another data stream .corpus was None"):
        make_train_loader(config, TOKENIZER, tmp_path).restore(position)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(np.array([6, 262])), r"examples\[1\] has token id 262 and the vocabulary ends at 261"),
        (Example(np.array([6, -2])), r"examples\[1\] has token id -2"),
        (Example(np.zeros(0, int)), r"examples\[1\] has ids of shape \(0,\) .* give integers, at least one"),
        (Example(np.array([0.5])), r"examples\[1\] has ids of shape \(1,\) and type float64"),
        (Example(np.array([6, 7]), np.ones(3, np.uint8)), r"weights of shape \(3,\) and ids of shape \(2,\)"),
        (Example(np.array([6, 7]), np.ones(2)), "weights of type float64; make them bool, uint8 or float32"),
        (Example(np.array([6, 7]), np.array([1, -1], np.float32)), "weights from -1.0 to 1.0; make all finite"),
        (Example(np.array([6, 7]), np.array([1, np.nan], np.float32)), "weights from nan to nan"),
        (np.array([6, 7]), r"examples\[1\] is a ndarray; make it an Example"),
    ],
)
def test_bad_examples_are_named(make_config, example, message):
    with pytest.raises(ValueError, match=message):
        make_loader(make_config("unused"), TOKENIZER, [CONVERSATIONS[0], example])


def test_examples_that_teach_nothing_are_refused(make_config):
    with pytest.raises(ValueError, match="there are no examples to train on"):
        make_loader(make_config("unused"), TOKENIZER, [])
    with pytest.raises(ValueError, match="no token of 2 examples has weight"):
        check_examples(2 * [Example(np.array([6, 7]), np.zeros(2, bool))], 262)


@pytest.mark.parametrize("count", [1, 2])
def test_a_loader_needs_one_example_only(make_config, count):
    """It comes again in every epoch; so does one long document of a corpus."""
    loader = make_loader(make_config("unused"), TOKENIZER, CONVERSATIONS[:count])
    batch = loader.next_batch(4)
    loader.close()
    learned = batch["targets_BS"][batch["loss_weights_BS"] > 0]
    answers = np.concatenate([example.ids[example.weights > 0] for example in CONVERSATIONS[:count]])
    assert set(learned.tolist()) == set(answers.tolist())
