"""Every command refuses wrong inputs at its door: a message of at most 3 lines with the value and the remedy, exit code
2, within 10 seconds, and nothing written.

One line is one case: the command, its arguments, what the message must contain, the files in the folder "{d}".
"""

import json
import os

import numpy as np
import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict, to_dict
from deepseek_jax.data.bpe import byte_tokenizer
from tests.experiments.doors import SECONDS, case, doors, put, tree

pytestmark = pytest.mark.xdist_group("wrong_inputs")

MOST_LINES = 3
TINY = "--config=configs/tiny.py"
NEW = f"{TINY} --workdir={{d}}/W"
FILE = {"file": "a file"}
NANO = "--config=tests/training/nano.py:{d}/corpus --workdir={d}/W"
CONFIG = from_config_dict(tiny.get_config())
RUN = {"W/config.json": json.dumps(to_dict(CONFIG))}
WITHOUT_MTP = {"W/config.json": json.dumps(to_dict(CONFIG.with_(model={"num_mtp_layers": 0})))}
SERVED = RUN | {"W/tokenizer.json": byte_tokenizer().save}
BASE = "--hf=tests/golden/v2"
FP32 = f"{BASE} --precision=fp32 --config.execution.precision=fp32"
LINK = {"link": lambda path: path.symlink_to(path.with_name("nothing"))}
NPY = {"e.npy": lambda path: np.save(path, np.zeros((2, 8)))}
LONG = "x" * 300
A_CONFIG = "from configs import tiny\n\n\ndef get_config():\n    return tiny.get_config()\n"

FLAGS = [
    case("train", "", "--config is missing", "--config=configs/tiny.py"),
    case("train", "--config", "--config", "--help"),
    case("train", "--config= --workdir={d}/W", "--config is empty"),
    case("train", TINY, "--workdir is missing", "--workdir=runs/tiny"),
    case("train", f"{TINY} --workdri={{d}}/W", "--workdri is unknown", "--workdir"),
    case("train", f"{NEW} --learning_rate=1", "--learning_rate is unknown", "--config.optimizer.learning_rate"),
    case("train", f"{NEW} --zzzzzz", "--zzzzzz is unknown", "--help", "--print_config"),
    case("train", f"{NEW} --lr=1", "--lr is unknown", "--config.optimizer.learning_rate?"),
    case("train", f"{NEW} config.model.width=64", "config.model.width=64 is not a flag", "--config.model.width=64"),
    case("train", f"{TINY} {{d}}/W", "is not a flag"),
    case("train", f"{NEW} -- --config.model.width=64", "is not a flag"),
    case("train", f"{NEW} --cpu_devices=0", "--cpu_devices=0", "[1, 1024]"),
    case("train", f"{NEW} --cpu_devices=100000", "--cpu_devices=100000", "[1, 1024]"),
    case("train", f"{NEW} --cpu_devices=two", "--cpu_devices=two", "Simulate"),
    case("train", f"{NEW} --print_config=perhaps", "--print_config=perhaps"),
    case("train", f"{NEW} --coordinator=garbage --num_processes=2 --process_id=0", "=garbage", "host:port"),
    case("train", f"{NEW} --coordinator=http://a:1 --num_processes=2 --process_id=0", "http://a:1", "host:port"),
    case("train", f"{NEW} --coordinator=a:99999 --num_processes=2 --process_id=0", "a:99999", "host:port"),
    case("train", f"{NEW} --coordinator=a:1234", "--num_processes, --process_id is missing", "--distributed"),
    case("train", f"{NEW} --process_id=1", "--coordinator, --num_processes is missing", "--distributed"),
    case("train", f"{NEW} --coordinator=a:1234 --num_processes=2 --process_id=2", "--process_id=2", "must be below"),
    case("train", f"{NEW} --coordinator=a:1 --num_processes=0 --process_id=0", "--num_processes=0", "number of proc"),
    case("evaluate", "--workdir={d}/W --process_id=1", "holds no run"),
    case("evaluate", "--workdir={d}/W --coordinator=a --num_processes=1 --process_id=0", "host:port", files=RUN),
    case(
        "train",
        f"{NEW} --distributed",
        "pip install 'jax[k8s]'",
        environment={"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ),
    case("train", NEW, "JAX_ENABLE_X64=True", "unset it", environment={"JAX_ENABLE_X64": "1"}),
    case("train", NEW, "=strict", "unset it", environment={"JAX_NUMPY_DTYPE_PROMOTION": "strict"}),
    case("train", NEW, "=raise", "unset it", environment={"JAX_NUMPY_RANK_PROMOTION": "raise"}),
    case("train", NEW, "JAX_PLATFORMS=nonsense", "unset it", environment={"JAX_PLATFORMS": "nonsense"}),
    case("evaluate", "", "--workdir is missing", "Folder of the run"),
    case("evaluate", "--workdir={d}/W --step=-1", "--step=-1"),
    case(
        "evaluate",
        "--workdir={d}/W",
        "learned from conversations",
        "eval/loss in metrics.jsonl",
        files=RUN | {"W/posttraining.json": '{"stage": "sft"}'},
    ),
    case("evaluate", "--workdir={d}/W --step=last", "--step=last", "newest"),
    case("evaluate", "--workdir={d}/W --jsno", "--jsno is unknown", "--json"),
    case("generate", "--workdir={d}/W", "--prompt is missing", "give the text to continue"),
    case("generate", "--workdir={d}/W --prompt=x --prompts=y", "both given; leave one out"),
    case("generate", "--workdir={d}/W --prompt=x --out=y", "--out=y is for --prompts"),
    case("generate", "--workdir={d}/W --prompt=x --chat", "--prompt and --chat are both given; leave one out"),
    case("generate", "--prompt=x", "--workdir is missing, and --hf too", "give the folder"),
    case("generate", "--workdir={d}/W --hf={d}/H --prompt=x", "--workdir and --hf are both given; leave one out"),
    case("generate", "--hf={d}/H --prompt=x --step=3", "--step=3 is for --workdir"),
    case("generate", "--hf={d}/H --prompt=x", "there is no folder {d}/H", "name the folder"),
    case("generate", "--hf=gs://bucket/run --prompt=x", "is an address"),
    case("generate", "--hf={d}/H --prompt=x", "H/config.json is missing", files={"H/a": "a file"}),
    case("generate", "--hf={d}/W --prompt=x", "is the workdir of a run", "give --workdir", files=RUN),
    case("generate", f"{BASE} --prompt=x", "lacks ['tokenizer.json', 'tokenizer_config.json']", "put these files"),
    case("plan", f"{TINY} --topology=h200:8 --decode --nocompile", "--nocompile and --decode", "leave one of them out"),
    case("plan", f"{TINY} --topology=h200:8 --search --nocompile", "--nocompile and --search", "leave --nocompile out"),
    case("plan", f"{TINY} --topology=h200:8 --decode --search", "--search and --decode", "leave one of them out"),
    case("plan", f"{TINY} --topology=h200:8 --nocompile", "--nocompile: h200 is a card", "leave --nocompile out"),
    case("plan", f"{TINY} --plot={{d}}/p.pdf", "--plot", "must end in .png"),
    case("plan", f"{TINY} --decode", "--decode needs devices", "--topology=h200:8"),
    case("plan", f"{TINY} --adapters=8:ffn --search --devices=1", "--search and --adapters", "leave one of them out"),
    case("plan", f"{TINY} --adapters=8", "--adapters=8 is not RANK:TARGETS", "16:attention,experts"),
    case("plan", f"{TINY} --search", "--search needs devices", "--topology=h200:128"),
    case("serve", "", "--workdir is missing, and --hf too", "give the folder"),
    case("serve", "--workdir={d}/W --hf={d}/H", "--workdir and --hf are both given; leave one out"),
    case("serve", "--workdir={d}/W", "holds no run"),
    case("serve", "--hf={d}/H --step=3", "--step=3 is for --workdir"),
    case("serve", "--workdir={d}/W --host=0.0.0.0", "--host=0.0.0.0", "$DEEPSEEK_JAX_API_KEY", "--insecure", files=RUN),
    case("serve", "--workdir={d}/W --host=203.0.113.7 --insecure", "203.0.113.7", "give another", files=RUN),
    case("serve", "--workdir={d}/W --api_key=", "a key of --api_key", "is empty", files=RUN),
    case("serve", "--workdir={d}/W", "is empty", "leave it out", environment={"DEEPSEEK_JAX_API_KEY": "a,,b"}),
    case("serve", "--workdir={d}/W --port=65536", "--port=65536", "Port to serve"),
    case("serve", "--workdir={d}/W --name=", "--name", "give some letters"),
    case("serve", "--workdir={d}/W --batch_size=0", "--batch_size=0", "made at once"),
    case("serve", "--workdir={d}/W --distributed", "runs in one process"),
    # before the weights, of which there are none
    case(
        "serve",
        "--workdir={d}/W --port=0 --most_positions=257",
        "--most_positions = 257",
        "from 1 to 256",
        files=SERVED,
    ),
    case("serve", "--workdir={d}/W --port=0 --cache_tokens=9999999999", "pages takes", "would fit", files=SERVED),
    case(
        "serve",
        "--workdir={d}/W --port=0 --num_drafts=1",
        "--num_drafts = 1",
        "--num_drafts to 0",
        files=SERVED | WITHOUT_MTP,
    ),
    case("generate", "--workdir=tests/golden/v2 --prompt=x", "and no run", "give --hf"),
    case("generate", "--workdir={d}/W --chat", "has no chat_template", "add one of them", files=RUN),
    case("generate", "--workdir={d}/W --prompt=x --data_devices=3", "3", "--cpu_devices", files=RUN),
    case(
        "generate", "--workdir={d}/W --prompts={d}/p", "line 1", "whole number", files={"p": '{"prompt":"","seed":[]}'}
    ),
    case("generate", "--workdir={d}/W --prompt=x --distributed", "runs in one process", "--expert_devices"),
    case("generate", "--workdir={d}/W --prompts={d}/none.jsonl", "none.jsonl", "check the path"),
    case("generate", "--workdir={d}/W --prompts={d}/p", "line 2 is not JSON", files={"p": '{"prompt": "x"}\nx\n'}),
    case("generate", "--workdir={d}/W --prompts={d}/p", "line 1 has no text", files={"p": '{"prompt": 1}\n'}),
    case("generate", "--workdir={d}/W --prompts={d}/p", "holds no prompt", files={"p": "\n"}),
    case("generate", "--workdir={d}/W --prompt=x --batch_size=0", "--batch_size=0", "decoded at once"),
    case("generate", "--workdir={d}/W --prompt=x --seed=-1", "--seed=-1", "4294967295"),
    case("generate", "--workdir={d}/W --prompt=x --seed=4294967296", "--seed=4294967296", "4294967295"),
    case("generate", "--workdir={d}/W --prompt=x --seed=99999999999999999999", "--seed=9999", "4294967295"),
    case("generate", "--workdir={d}/W --prompt=x --max_new_tokens=0", "--max_new_tokens=0", "Stop after"),
    case("generate", "--workdir={d}/W --prompt=x --temperature=nan", "--temperature = nan", "at least 0", files=RUN),
    case("generate", "--workdir={d}/W --prompt=x --temperature=-1", "--temperature = -1", "at least 0", files=RUN),
    case("generate", "--workdir={d}/W --prompt=x --temperature=hot", "--temperature=hot", "Divides the logits"),
    case("generate", "--workdir={d}/W --prompt=x --top_p=0", "--top_p = 0", "(0, 1]", files=RUN),
    case("generate", "--workdir={d}/W --prompt=x --top_k=-1", "--top_k = -1", "at least 0", files=RUN),
    case("generate", "--workdir={d}/W --prompt=x --top_k=99999999999", "--top_k=99999999999", "0 means all"),
    case("generate", "--workdir={d}/W --prompt=x --expert_devices=0", "--expert_devices=0", "share the routed experts"),
    case("generate", "--workdir={d}/W --prompt=x --expert_devices=3", "3", files=RUN),
    case("generate", "--workdir={d}/W --prompt=\udce9", "--prompt=\\udce9 is not UTF-8", "convert", files=RUN),
    case("convert_hf", BASE, "give one of import, export, adapters, verify, logits", "nothing"),
    case("convert_hf", f"improt {BASE}", "give one of import, export, adapters, verify, logits", "improt"),
    case("convert_hf", f"import export {BASE}", "give one of import, export, adapters, verify", "import export"),
    case("convert_hf", "import", "--hf is missing", "Hugging Face"),
    case("convert_hf", f"import {BASE}", "--workdir is missing", "Folder of the run"),
    case("convert_hf", "export --hf={d}/out", "--workdir is missing", "Folder of the run"),
    case("convert_hf", f"logits {BASE}", "--tokens is missing", "int32"),
    case("convert_hf", f"logits {BASE} --tokens={{d}}/t.npy", "--output is missing", ".npz"),
    case("convert_hf", f"verify {BASE} --precision=int4", "--precision=int4", "fp8"),
    case("convert_hf", f"verify {BASE} --shard_gigabytes=0", "--shard_gigabytes=0", "size of one file"),
    case("convert_hf", "export --hf={d}/out --workdir={d}/W --precision=fp32", "--precision=fp32", "choose", files=RUN),
    case("convert_hf", "export --hf={d}/out --workdir={d}/W --step=-1", "--step=-1", "newest", files=RUN),
    case("benchmarks.training_step", "", "--config is missing", "--config=configs/tiny.py"),
    case("benchmarks.training_step", f"{TINY} --steps=5", "--steps=5", "Timed steps"),
    case("benchmarks.training_step", f"{TINY} --batch_size=0", "--batch_size=0", "Sequences per step"),
    case("benchmarks.training_step", f"{TINY} --batch_size=6", "6", "multiple of micro_batch_size = 8"),
    case("benchmarks.training_step", f"{TINY} --batch_size=1000000000000", "1e+12", "2147483647"),
    case("benchmarks.layer_benchmark", "--tokens=0", "--tokens=0", "one sequence"),
    case("benchmarks.layer_benchmark", "--rows=1000000000000", "--rows=1000000000000", "each expert"),
    case("benchmarks.layer_benchmark", "--local_experts=-1", "--local_experts=-1", "Routed experts"),
    case("benchmarks.layer_benchmark", "--config.model.num_shared_experts=0", "num_shared_experts = 0", "set it to 1"),
    case("benchmarks.traffic", "", "--config is missing", "--config=configs/tiny.py"),
    case("benchmarks.traffic", f"{TINY} --devices=0", "--devices=0", "Number of devices"),
    case("benchmarks.traffic", f"{TINY} --devices=3", "micro_batch_size = 8", "numbers of devices that work"),
    case("benchmarks.traffic", f"{TINY} --compiled --devices=8", "--devices = 8", "--cpu_devices"),
    case("benchmarks.traffic", f"{TINY} --config.mesh.tensor=2", "config.mesh.tensor = 2", "set it to 1"),
    case(
        "benchmarks.traffic", f"{TINY} --config.execution.exchange=local --devices=8 --config.mesh.expert=4", "'local'"
    ),
    case("benchmarks.traffic", f"{TINY} --experts={{d}}/none.npy", "none.npy cannot be read", "check the path"),
    case("benchmarks.traffic", f"{TINY} --experts={{d}}/file", "is no .npy file", "save one", files=FILE),
    case("benchmarks.traffic", f"{TINY} --experts={{d}}/e.npy", "float64 [2, 8]", "integers [tokens, ", files=NPY),
    case("benchmarks.hf_benchmark", "", "--hf is missing", "Folder to write"),
    case("benchmarks.hf_benchmark", "--hf={d}/x --gigabytes=1e12", "--gigabytes=1e12", "Approximate size"),
    case("benchmarks.hf_benchmark", "--hf={d}/x --gigabytes=9999", "--gigabytes=9999", "free", "lower"),
    case("benchmarks.hf_benchmark", "--hf={d}/x --gigabytes=lots", "--gigabytes=lots", "Approximate size"),
    case("benchmarks.synthetic_checkpoint", "--hf={d}/x --shard_gigabytes=0", "--shard_gigabytes=0", "Size of one"),
    case("benchmarks.results_table", "all", "all is not a flag"),
    case("studies.accumulator_study", "now", "now is not a flag"),
    case("studies.accumulator_card", "", "Hopper GPU", "run it on one"),
    case("studies.loss_gap", "--seeds=0", "--seeds=0", "Number of seeds"),
    case("studies.loss_gap", "--workdir={d}/W --config.training.num_tokens=10", "num_tokens = 10", "raise it"),
    case("studies.scaling_study", "--floder={d}", "--floder is unknown", "--folder"),
]
PATHS = [
    case("train", f"{TINY} --workdir=", "--workdir is empty", "name a folder"),
    case("train", f"{TINY} --workdir=gs://bucket/run", "gs://bucket/run is an address", "mount the bucket"),
    case("train", f"{TINY} --workdir=file:///tmp/run", "is an address"),
    case("train", f"{TINY} --workdir=~nobody-has-this-name/x", "home folder is unknown", "whole path"),
    case("train", f"{TINY} --workdir={{d}}/file", "cannot be a folder", "name another", files=FILE),
    case("train", f"{TINY} --workdir={{d}}/file/W", "cannot be a folder", "name another", files=FILE),
    case("train", f"{TINY} --workdir={{d}}/link", "cannot be a folder", "name another", files=LINK),
    case("train", f"{TINY} --workdir=/dev/null/x", "/dev/null", "name another"),
    case("train", f"{TINY} --workdir={{d}}/{LONG}", "File name too long", "name another"),
    case("train", f"{TINY} --workdir={'/x' * 5000}", "too long"),
    case("train", f"{TINY} --workdir={{d}}/\x1b[31m/\x07 --config.seed=-1", "seed = -1"),
    case("train", f"{NEW} --config.data.sources[0].path=gs://b/c", "sources[0].path = gs://b/c", "mount the bucket"),
    case("train", f"{NEW} --config.data.tokenizer=s3://b/t.json", "data.tokenizer = s3://b/t.json", "mount"),
    case("train", f"{NEW} --config.training.initial_weights=gs://b/c", "initial_weights = gs://b/c", "mount"),
    case("evaluate", "--workdir=gs://bucket/run", "is an address"),
    case("evaluate", "--workdir={d}/W", "holds no run", "experiments.train"),
    case("evaluate", "--workdir={d}/W --config={d}/none.py", "none.py", "configs/tiny.py", files=RUN),
    case("generate", "--workdir=gs://bucket/run --prompt=x", "is an address"),
    case("generate", "--workdir={d}/W --prompt=x", "holds no run", "experiments.train"),
    case("generate", "--workdir={d}/W\x1b[2J --prompt=x", "W\\x1b[2J holds no run"),
    case("convert_hf", "import --hf=gs://bucket/x --workdir={d}/W", "--hf = gs://bucket/x", "mount the bucket"),
    case("convert_hf", "verify --hf=", "--hf is empty"),
    case("convert_hf", "verify --hf={d}/none", "none"),
    case("convert_hf", f"import {BASE} --workdir={{d}}/file", "cannot be a folder", files=FILE),
    case("convert_hf", "export --hf=gs://bucket/x --workdir={d}/W", "--hf = gs://bucket/x", files=RUN),
    case("convert_hf", "export --hf={d}/file --workdir={d}/W", "cannot be a folder", files=RUN | FILE),
    case("convert_hf", "export --hf={d}/out --workdir={d}/none", "holds no run"),
    case("convert_hf", f"logits {FP32} --tokens={{d}}/t.npy --output={{d}}/o.npz", "t.npy", "np.save"),
    case("convert_hf", f"logits {BASE} --tokens={{d}}/t.npy --output={{d}}", "is a folder", "name a file"),
    case("convert_hf", f"logits {BASE} --tokens={{d}}/t.npy --output={{d}}/no/o.npz", "no folder", "make it"),
    case("convert_hf", f"logits {FP32} --tokens={{d}}/file --output={{d}}/o.npz", "not an .npy file", files=FILE),
    case("benchmarks.training_step", f"{TINY} --json={{d}}", "is a folder", "name a file"),
    case("benchmarks.training_step", f"{TINY} --json=gs://b/x.json", "is an address"),
    case("benchmarks.training_step", f"{TINY} --workdir={{d}}/file", "cannot be a folder", files=FILE),
    case("benchmarks.layer_benchmark", "--json={d}", "is a folder", "name a file"),
    case("benchmarks.hf_benchmark", "--hf={d}/file", "cannot be a folder", files=FILE),
    case("benchmarks.hf_benchmark", "--hf={d}/x --json={d}", "is a folder", "name a file"),
    case("benchmarks.synthetic_checkpoint", "--hf=gs://b/x", "is an address"),
    case("studies.accumulator_study", "--folder={d}/file", "cannot be a folder", files=FILE),
    case("studies.scaling_study", "--folder=gs://b/x", "is an address"),
    case("studies.activation_study", "--folder={d}/file", "cannot be a folder", files=FILE),
    case("studies.loss_gap", "--folder={d}/file", "cannot be a folder", files=FILE),
    case("studies.accumulator_card", "--json={d}", "is a folder", "name a file"),
]


def config_file(text, *says, name="c.py", argument=""):
    """A file that is not a usable configuration."""
    files = {} if text is None else {name: text}
    return case("train", f"'--config={{d}}/{name}{argument}' --workdir={{d}}/W", *says, files=files)


def assigned(key, value, *says):
    """A file that gives a key a value of another type."""
    text = A_CONFIG.replace("    return", f"    c = tiny.get_config()\n    c.{key} = {value}\n    return")
    return config_file(text, *says)


FILES = [
    config_file(None, "No such file", "configs/tiny.py"),
    config_file(lambda path: path.mkdir(), "is a folder", "configs/tiny.py"),
    config_file(os.mkfifo, "is a FIFO", "configs/tiny.py"),
    config_file(lambda path: path.symlink_to(path), "symbolic links"),
    case("train", "--config=/dev/zero --workdir={d}/W", "is a device", "configs/tiny.py"),
    case("train", "--config=gs://b/c.py --workdir={d}/W", "is an address"),
    case("train", "--config=configs/tiny.json --workdir={d}/W", "No such file"),
    case("train", f"--config={{d}}/{LONG}.py --workdir={{d}}/W", "File name too long"),
    config_file('{"model": true}', "is JSON", "Python file", name="c.json"),
    config_file('{"model": true}', "is JSON", "Python file"),
    config_file("", "has no get_config()", "configs/tiny.py"),
    config_file("get_config = 5\n", "has no get_config()", "configs/tiny.py"),
    config_file("def get_config(:\n", "is not Python", "line 1"),
    config_file("name: tiny\nwidth: [64\n", "is not Python", "get_config()"),
    config_file("(" * 5000, "is not Python"),
    config_file(b"a = '\xe9'\n", "not UTF-8"),
    config_file(b"a = 1\0\n", "is not Python", "null bytes"),
    config_file("#" * 2_000_000, "larger than"),
    config_file("import no_such_package\n", "No module named 'no_such_package'", "line 1"),
    config_file("import sys\nsys.exit(0)\n", "SystemExit", "line 2"),
    config_file("def get_config():\n    raise RuntimeError('a\\x1b[31mb')\n", "a\\x1b[31mb", "line 2"),
    config_file("def get_config():\n    return get_config()\n", "RecursionError"),
    config_file("def get_config():\n    pass\n", "returned NoneType", "return a ConfigDict"),
    config_file("def get_config():\n    return [1]\n", "returned list", "return a ConfigDict"),
    config_file("def get_config(corpus):\n    pass\n", "takes another number of arguments", ":ARGUMENT"),
    config_file(A_CONFIG, "takes another number of arguments", "drop", argument=":corpus"),
    config_file(A_CONFIG.replace("get_config()\n", "get_config\n", 1), "returned function"),
    config_file("def get_config():\n    return {1: 2}\n", "config.1 is unknown"),
    assigned("data.sources", '"/my/one.txt"', "line 6: sources = /my/one.txt is of type str", 'write ("/my/one.txt",)'),
    assigned("optimizer.learning_rate", "1e-3", 'write (("constant", 1.0, 0.001),)'),
    assigned("model.width", '"wide"', "width = wide is of type str and must be of type int; write a value of type int"),
    config_file("def get_config():\n    return {'name': 'x'}\n", "config lacks", "configs/deepseek_v3.py"),
    config_file(
        A_CONFIG.replace("    return", "    c = tiny.get_config()\n    c.model.depth = 3\n    return c\n    return"),
        "config.model.depth is unknown",
    ),
    config_file("def get_config():\n    return {'model': 3}\n", "config"),
]


def field(override, *says):
    """A value of the configuration."""
    return case("train", f"{NEW} '--config.{override}'", *says)


FIELDS = [
    field("model.widht=64", "--config.model.widht", "--config.model.width"),
    field("modle.width=64", "--config.modle.width", "--config.model.width"),
    field("width=64", "--config.width", "--config.model.width"),
    field("zzz.zzz=64", "--config.zzz.zzz", "configs/deepseek_v3.py"),
    field("optimizer.lr=1e-3", "did you mean --config.optimizer.learning_rate?"),
    field("optimizer.zz=1", "--config.optimizer.zz: ", "optimizer has learning_rate, warmup_steps, b1"),
    field(".=1", "not a key"),
    field('model["=1', "not a key"),
    field("model.width=abc", "--config.model.width=abc", "whole number"),
    field("model.width=", "--config.model.width=", "whole number"),
    field("model.width", "no value", "--config.model.width=VALUE"),
    field("model.width=64.5", "--config.model.width=64.5", "whole number"),
    field("model.width=\x1b[31m", "\\x1b[31m", "whole number"),
    case("train", f"{NEW} --noconfig.model.width", "true or false", "--config.model.width=VALUE"),
    field("model.normalize_gates=maybe", "normalize_gates=maybe", "true or false"),
    field("optimizer.weight_decay=little", "weight_decay=little", "a number"),
    field("optimizer.learning_rate=((", "learning_rate = ((", "is not a number", "write 1e-3"),
    field("optimizer.learning_rate=" + "(" * 5000, "learning_rate = ((", "is not a number"),
    field("optimizer.learning_rate=(1, 2", "learning_rate=(1, 2", "Python tuple"),
    field("optimizer.learning_rate=fast", "learning_rate", "fast"),
    field('optimizer.learning_rate=(("constant", 1.0, 1e308),)', "learning_rate", "1e+308", "FP32"),
    field('training.batch_size=(("constant", 1.0, 1e30),)', "1e+30", "2147483647 tokens", "lower"),
    field("model=5", "--config.model=5", "Python dict"),
    field('model={"width": 64}', "config.model lacks", "configs/deepseek_v3.py"),
    field("data.sources[5].path=x", "sources[5].path"),
    field("data.sources[0].pth=x", "sources[0].pth"),
    field("data.sources=A,B", "data.sources=A,B must be a path", '\'("A", "B")\''),
    field('data.sources=({"path": "stdlib", "weight": -1.0},)', "weight = -1", "stdlib", "positive"),
    field('data.sources=({"path": "stdlib", "weight": 1e999},)', "weight = inf", "stdlib"),
    field("model.width=2147483648", "model.width = 2147483648", "at most 2147483647"),
    field("model.width=9223372036854775808", "model.width = 9223372036854775808", "at most"),
    field("model.width=" + "9" * 4000, "at most", "bits"),
    field("model.width=" + "9" * 5000, "whole number"),
    field("model.width=2147483647", "parameters", "lower"),
    field("model.num_layers=2147483647", "num_layers = 2147483647", "at most 10000"),
    field("model.num_mtp_layers=1000", "num_mtp_layers = 1000", "at most 100"),
    field("model.experts_per_token=100", "experts_per_token = 100 exceeds", "lower"),
    field("model.routed_scale=1e308", "routed_scale = 1e+308", "FP32", "lower"),
    field("model.init_std=1e-300", "init_std = 1e-300", "FP32", "raise"),
    field("model.rope_base=1e-3", "rope_base = 0.001", "above 1"),
    field("model.yarn.factor=1e308", "yarn.factor = 1e+308", "lower"),
    field("optimizer.weight_decay=1e308", "weight_decay = 1e+308", "lower"),
    field("data.sequence_length=2147483647", "sequence_length = 2147483647", "lower"),
    field("data.prefetch=9223372036854775808", "prefetch = 9223372036854775808", "at most 64"),
    field("data.on_error=ignore", "on_error = 'ignore'", "skip"),
    field("training.num_tokens=1e308", "num_tokens = 1e+308", "2**63"),
    field("training.num_tokens=0.5", "num_tokens = 0.5", "at least 1"),
    field("training.num_tokens=1M", "num_tokens=1M", "a number, such as 1e6"),
    field("training.num_tokens=10", "num_tokens = 10 is less than the 2,048 tokens of one step", "raise it"),
    field("model.vocab_size=200", "vocab_size = 200 is too small for BPE", "raise it"),
    field("execution.expert_block=9223372036854775808", "expert_block", "at most"),
    field("seed=-1", "seed = -1", "at least 0"),
    field("seed=4294967296", "seed = 4294967296", "at most 4294967295"),
    field("seed=9223372036854775808", "seed = 9223372036854775808", "at most 4294967295"),
    field("mesh.pipe=2", "mesh.pipe = 2 does not fit 1 devices", "--cpu_devices=2"),
    case(
        "train",
        f"{NEW} --config.execution.precision=bf16 --config.execution.experts=grouped",
        "grouped",
        "'auto' or 'blocks'",
    ),
    case("train", f"{NEW} --cpu_devices=2 --config.mesh.expert=4", "mesh.expert = 4", "2 devices", "--cpu_devices=4"),
    case("train", f"{NEW} --cpu_devices=3", "3 devices", "change it or the mesh"),
    case("evaluate", "--workdir={d}/W --config.model.width=64", "--config is missing", files=RUN),
    case("benchmarks.training_step", f"{TINY} --config.seed=-1", "seed = -1", "at least 0"),
    case("benchmarks.layer_benchmark", "--config.model.width=100", "width = 100", "multiple of 128"),
    case("convert_hf", f"verify {BASE} --config.model.widht=1", "--config.model.width"),
    case("studies.loss_gap", "--config.model.widht=1", "--config.model.width"),
]
RUNS = [
    case("evaluate", "--workdir={d}/W", "not valid JSON", "restore", files={"W/config.json": "{"}),
    case("generate", "--workdir={d}/W --prompt=x", "config lacks", files={"W/config.json": "{}"}),
    case("evaluate", "--workdir={d}/W", "no", files=RUN),
    case("evaluate", "--workdir={d}", "holds no run", "one of the runs inside, --workdir={d}/W", files=RUN),
    case("evaluate", "--workdir={d}/W/checkpoints", "the run's own folder, --workdir={d}/W", files=RUN),
    case("evaluate", "--workdir={d}", "train one with experiments.train", files={"hf/config.json": '{"x": 1}'}),
    case("train", f"{TINY} --workdir={{d}}/W/checkpoints", "inside of a run", "--workdir={d}/W", files=RUN),
    case("generate", "--workdir={d}/W/checkpoints/9 --prompt=x", "own folder, --workdir={d}/W", files=RUN),
    case(
        "train",
        f"{TINY} --workdir={{d}}/W --config.data.sequence_length=64",
        "holds a run with another config",
        "sequence_length: 256",
        "another --workdir",
        files=RUN,
    ),
    case(
        "train",
        f"{NEW} '--config.data.sources[0].path={{d}}/none'",
        "{d}/none' does not exist",
        "name a folder",
    ),
]


def empty(name, text, *says, skip=False):
    """A corpus without a text to train on."""
    skipping = " --config.data.on_error=skip" if skip else ""
    words = f"{TINY} --workdir={{d}}/W --config.data.sources={{d}}/{name}{skipping}"
    return case("train", words, *(says or ("holds no readable document", "add text")), files={name: text})


DATA = [
    case("train", f"{NEW} --config.data.tokenizer=/dev/zero", "/dev/zero", "a device", "'byte'"),
    case("train", f"{NEW} --config.data.tokenizer={{d}}/none.json", "none.json", "'byte'"),
    case("train", f"{NEW} --config.data.tokenizer={{d}}/file", "tokenizer.json", "'byte'", files=FILE),
    case("train", f"{NEW} '--config.data.sources[0].path={{d}}'", "is an empty folder", "put"),
    empty("a.txt", ""),
    empty("a.jsonl", ""),
    empty("a.jsonl", '{"content": "x", "id": "1"}\n', "keys ['content', 'id']", "--config.data.text_field=content"),
    empty("a.jsonl", '{"my text": "x"}\n', "'--config.data.text_field=my text'"),
    empty("a.jsonl", '{"content": "x"}\n' * 3, "a.jsonl' holds", "3 items skipped", "line 1 has no text", skip=True),
    case("train", f"{NEW} '--config.data.sources[0].path={{d}}/fifo'", "fifo", files={"fifo": os.mkfifo}),
    case("benchmarks.training_step", f"{TINY} '--config.data.sources[0].path={{d}}/none'", "none", "name a folder"),
    case("studies.loss_gap", "--workdir={d}/W '--config.data.sources[0].path={d}/none'", "none", "name a folder"),
]
CASES = [*FLAGS, *PATHS, *FILES, *FIELDS, *RUNS, *DATA]


@pytest.fixture(scope="module")
def door():
    with doors() as opened:
        yield opened


@pytest.mark.parametrize("wrong", CASES, ids=[f"{one.command} {one.words}"[:90] for one in CASES])
def test_wrong_input_is_refused_at_the_door(door, wrong, tmp_path):
    folder = tmp_path
    (folder / "d").mkdir()
    put(folder / "d", wrong.files)
    before = tree(folder / "d")
    code, seconds, printed = door.knock(wrong, folder)
    assert code == wrong.code, printed
    lines = printed.splitlines()
    assert 1 <= len(lines) <= MOST_LINES, printed
    assert lines[0].startswith(f"experiments.{wrong.command}: "), printed
    for words in wrong.says:
        assert words.replace("{d}", str(folder / "d")) in printed
    assert all(character.isprintable() or character == "\n" for character in printed), printed
    assert seconds < SECONDS
    after = tree(folder / "d")
    assert {name: after[name] for name in after if name not in wrong.leaves} == before


PROCESSES = ("--coordinator", "--num_processes", "--process_id", "--[no]distributed", "--cpu_devices")
HELP = {
    "train": ("--workdir", "--config", *PROCESSES),
    "evaluate": ("--workdir", "--[no]yardsticks", *PROCESSES),
    "generate": ("--prompt", "--seed", *PROCESSES),
    "convert_hf": ("import", "verify", "--hf", "--precision", *PROCESSES),
    "benchmarks.training_step": ("--batch_size", "--config", *PROCESSES),
    "benchmarks.layer_benchmark": ("--rows", *PROCESSES),
    "benchmarks.hf_benchmark": ("--gigabytes", "--[no]keep", *PROCESSES),
    "studies.activation_study": ("--folder", *PROCESSES),
    "studies.loss_gap": ("--seeds", "--folder", *PROCESSES),
    "studies.scaling_study": ("--folder",),
}


@pytest.mark.parametrize("command", HELP)
def test_help_is_about_this_project(door, command, tmp_path):
    code, _, printed = door.knock(case(command, "--help"), tmp_path)
    assert code == 0 and len(printed.splitlines()) < 75
    for flag in (*HELP[command], "--[no]traceback", "--helpfull"):
        assert flag in printed
    assert "--verbosity" not in printed  # of a library


def test_traceback_shows_the_rest(door, tmp_path):
    code, _, printed = door.knock(case("train", f"{TINY} --workdir={tmp_path} --config.seed=-1 --traceback"), tmp_path)
    assert code == 2 and "Traceback" in printed and "config_checks.py" in printed
    assert printed.splitlines()[-1] == "experiments.train: config.seed = -1 must be at least 0"
