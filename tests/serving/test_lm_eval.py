"""The official lm-eval package, unmodified, against the server: it knows nothing of it but the address.

Its tokenizer is the server's (`/tokenize`), its data sets are files that the test writes. Nothing needs the network.
"""

import json
import os
import string
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import Job
from deepseek_jax.serving.model import Model
from tests.inference.test_decode import expanded_logits, make_config, make_weights
from tests.serving.served import served
from tests.support.meshes import mesh_of

TOKENIZER = byte_tokenizer()
LENGTH = 128
CONFIG = make_config(vocab_size=TOKENIZER.vocab_size).with_(data={"sequence_length": LENGTH})
NUM_NEW = 20
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
output_type: {rest}
"""
PICK = 'multiple_choice\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'
SAY = f"generate_until\ngeneration_kwargs: {{until: ['!'], max_gen_toks: {NUM_NEW}, temperature: 0}}"
SAY += "\nmetric_list: [{metric: exact_match}]"


def write_task(folder, name, rest, lines):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, rest=rest))


def evaluate(folder, url, model):
    """Run lm-eval as a user does; return the results, and the samples of each task by document."""
    out = folder / "out"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--include_path", str(folder)]
    command += ["--model_args", f"base_url={url}/v1/completions,model={model},max_length={LENGTH}"]
    command += ["--tasks", "pick,say", "--batch_size", "4", "--output_path", str(out), "--log_samples"]
    offline = {"HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr[-3000:]
    samples = []
    for name in ("pick", "say"):
        lines = next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        samples.append(sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"]))
    return json.loads(next(out.rglob("results_*.json")).read_text())["results"], *samples


def teacher_forcing(question, choice):
    """Return the log-likelihood of a choice and whether it is what greedy decoding gives, without cache and engine."""
    context, whole = TOKENIZER.encode(question), TOKENIZER.encode(question + choice)
    logits_SV = expanded_logits(CONFIG, make_weights(CONFIG), np.array([whole + [0] * (LENGTH - len(whole))]))[0]
    log_SV = np.asarray(jax.nn.log_softmax(logits_SV.astype("float32")))
    places, targets = np.arange(len(context) - 1, len(whole) - 1), whole[len(context) :]
    is_greedy = bool((log_SV[places].argmax(axis=1) == targets).all())
    return float(log_SV[places, targets].sum()), is_greedy


@pytest.mark.slow
def test_scores_are_the_models_own(tmp_path):
    sizes = {"num_rows": 4, "num_pages": 40, "silent": True}
    with Engine.open(CONFIG, make_weights(CONFIG), TOKENIZER, mesh_of(), **sizes) as engine:

        def continued(questions):
            known = {"max_new_tokens": NUM_NEW, "sampling": GREEDY, "stop": ["!"]}
            answers = engine.generate([Job(prompt=TOKENIZER.encode(question), **known) for question in questions])
            return dict(zip(questions, (answer.text for answer in answers), strict=True))

        likely = {q: text[:1] for q, text in continued(string.ascii_letters).items()}
        question = next(q for q, letter in likely.items() if letter.isascii() and letter.isalpha())
        picks = [
            {"question": question, "choices": ["wrong", likely[question], "wrong"], "answer": 1},
            {"question": "Grün ist", "choices": ["die Wiese", "ü", "x" * 50], "answer": 0},
        ]
        says = [{"question": q, "answer": text} for q, text in continued(["Say it:", "Und dann"]).items()]
        write_task(tmp_path, "pick", PICK, picks)
        write_task(tmp_path, "say", SAY, [*says, {"question": "Say it:", "answer": "not this"}])
        model = Model(name="small", engine=engine, tokenizer=TOKENIZER, num_positions=LENGTH, most_jobs=64)
        with served(model) as server:
            results, picked, said = evaluate(tmp_path, server.url, model.name)
    expected = [[teacher_forcing(line["question"], choice) for choice in line["choices"]] for line in picks]
    found = [[(float(x), str(y) == "True") for ((x, y),) in sample["resps"]] for sample in picked]
    for sample, known in zip(found, expected, strict=True):
        assert [score for score, _ in sample] == pytest.approx([score for score, _ in known], abs=1e-4)
        assert [greedy for _, greedy in sample] == [greedy for _, greedy in known]
    assert found[0][1][1]  # the likely one
    best = [int(np.argmax([score for score, _ in known])) for known in expected]
    assert results["pick"]["acc,none"] == np.mean([best[0] == 1, best[1] == 0])
    assert [sample["resps"][0][0] for sample in said] == [line["answer"] for line in [*says, says[0]]]
    assert results["say"]["exact_match,none"] == pytest.approx(2 / 3)
