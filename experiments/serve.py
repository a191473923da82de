"""Serve a model to clients of OpenAI's API: `python -m experiments.serve --workdir=runs/tiny`, or --hf=FOLDER.

The model is that of a run (--workdir), or that of a folder in Hugging Face's format (--hf): a released checkpoint, or
an export of ours. A page to talk to it is at the address that is printed; programs use the same address with /v1:

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="tiny", prompt="def ", max_tokens=50, stream=True)

It answers this machine only, unless --host says otherwise. Then set keys, in $DEEPSEEK_JAX_API_KEY. Ctrl-C or SIGTERM
lets running requests end, for up to --drain_seconds; a second one stops at once.
"""

import contextlib
import importlib.util
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import expert_mesh
from deepseek_jax.inference.opening import check_opening
from deepseek_jax.inference.page_pool import PAGE_SIZE
from deepseek_jax.inputs import is_loopback, printable_lines, shown
from experiments import command, session
from experiments.model_source import Source, open_named

if TYPE_CHECKING:
    from deepseek_jax.serving.service import Service

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
HF = flags.DEFINE_string("hf", None, "Folder in Hugging Face's format instead.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest intact one by default.", lower_bound=0)
NAME = flags.DEFINE_string("name", None, "What clients call the model; by default what its configuration calls it.")
CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", None, "v3, r1, v3.1 or a .jinja file; by default the template in the model's folder."
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve; 0.0.0.0 for all of this machine.")
PORT = flags.DEFINE_integer("port", 8000, "Port to serve; 0 takes a free one.", lower_bound=0, upper_bound=65535)
API_KEY = flags.DEFINE_multi_string(
    "api_key",
    [],
    "Key that every request must have; several may be given. $DEEPSEEK_JAX_API_KEY is better: others see"
    " a command line",
)
INSECURE = flags.DEFINE_bool("insecure", False, "Serve other machines without a key.")
ALLOW_ORIGIN = flags.DEFINE_multi_string(
    "allow_origin", [], "Pages of other servers that may call this one from a browser, such as https://example.org"
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "How many texts are made at once.", lower_bound=1, upper_bound=2**12
)
CACHE_TOKENS = flags.DEFINE_integer(
    "cache_tokens",
    None,
    "Tokens that the cache holds; by default --batch_size of the longest texts, or what fits.",
    lower_bound=PAGE_SIZE,
)
MOST_POSITIONS = flags.DEFINE_integer(
    "most_positions", None, "Longest prompt and text together; by default what the model knows.", lower_bound=2
)
MOST_WAITING = flags.DEFINE_integer(
    "most_waiting", 1024, "How many texts may wait; more requests get 429.", lower_bound=1, upper_bound=2**20
)
REQUESTS_PER_MINUTE = flags.DEFINE_integer(
    "requests_per_minute", 0, "Of one key, or of one address without keys; 0 for any number.", lower_bound=0
)
REQUEST_SECONDS = flags.DEFINE_float(
    "request_seconds", 600.0, "After this time a text ends wherever it stands.", lower_bound=0.1
)
MOST_BODY_MIB = flags.DEFINE_integer(
    "most_body_mib", 16, "Largest body of a request, in MiB.", lower_bound=1, upper_bound=1024
)
DRAIN_SECONDS = flags.DEFINE_float(
    "drain_seconds", 30.0, "For which running requests may go on after Ctrl-C or SIGTERM.", lower_bound=0.0
)
NUM_DRAFTS = flags.DEFINE_integer(
    "num_drafts", 0, "Tokens that the MTP layer drafts for each text; 0 drafts none.", lower_bound=0, upper_bound=3
)
DRAFTING_ROWS = flags.DEFINE_integer(
    "drafting_rows", None, "Draft only while at most so many texts are made; by default always.", lower_bound=1
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the engine.", lower_bound=0, upper_bound=2**32 - 1)

# After which a thread of Python hands over to another: with the usual 5 ms the event loop would hold up the engine's
# thread, which has a step of 1.3 ms to dispatch.
SWITCH_SECONDS = 5e-4
KEY_VARIABLE = "DEEPSEEK_JAX_API_KEY"
# What the engine calls sizes, and the flags that set them.
FLAGS = {"num_rows": "--batch_size", "num_positions": "--most_positions", "num_drafts": "--num_drafts"}
NAMES = re.compile(rf"\b({'|'.join(FLAGS)})\b")
INSTALL = "pip install -e '.[serve]'"  # in a clone: no package index has this project


def main(_) -> None:
    """Check, bind, read the model, compile, serve."""
    check_installed()
    sys.setswitchinterval(SWITCH_SECONDS)
    from deepseek_jax.serving import server

    check_flags()
    keys = read_keys()
    if not is_loopback(HOST.value) and not keys and not INSECURE.value:
        raise ValueError(
            f"--host={shown(HOST.value)} lets other machines in, and there is no key; set ${KEY_VARIABLE}, or give"
            " --insecure"
        )
    source = open_named(WORKDIR.value, HF.value, STEP.value)
    with contextlib.closing(server.bind(HOST.value, PORT.value)) as bound:  # before the long work
        session.start()
        service = open_service(source)
        ended_by = serve(service, bound, keys)
    if ended_by is not None:
        sys.exit(128 + ended_by)


def check_installed() -> None:
    """Refuse to start without the libraries of the extra `serve`.

    Raises:
        ValueError: one is not installed.
    """
    for module in ("starlette", "uvicorn", "llguidance"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"serving needs {module}; install it in the clone with: {INSTALL}")


def check_flags() -> None:
    """Refuse flags that do not go together."""
    if DRAFTING_ROWS.value is not None and not NUM_DRAFTS.value:
        raise ValueError(f"--drafting_rows={DRAFTING_ROWS.value} is for --num_drafts of 1 or more; give both")
    if session.COORDINATOR.value is not None or session.DISTRIBUTED.value:
        raise ValueError("experiments.serve runs in one process; leave --coordinator and --distributed out")
    if NAME.value is not None and not NAME.value.isprintable() or NAME.value == "":
        raise ValueError(f"--name={shown(NAME.value)} is not a name; give some letters")


def read_keys() -> Sequence[str]:
    """Return the keys of --api_key and of the environment, there separated by commas.

    Raises:
        ValueError: one of them is empty or has blanks, which no header can bring.
    """
    keys = (
        [*API_KEY.value, *os.environ.get(KEY_VARIABLE, "").split(",")] if KEY_VARIABLE in os.environ else API_KEY.value
    )
    for key in keys:
        if not key.strip() or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"a key of --api_key or ${KEY_VARIABLE} is empty, or has blanks or letters beyond ASCII; give another,"
                " or leave it out"
            )
    return keys


def open_service(source: Source) -> "Service":
    """Return the model in an engine whose programs are compiled, with its limits."""
    from deepseek_jax.serving.chat_format import open_chat_format
    from deepseek_jax.serving.grammar import Grammars
    from deepseek_jax.serving.model import Model
    from deepseek_jax.serving.service import Limits, Service

    tokenizer = source.tokenizer()
    vocab_size, ends = tokenizer.vocab_size, source.generation.ends
    chat = open_chat_format(source.chat_folder, tokenizer, vocab_size=vocab_size, name=CHAT_TEMPLATE.value, ends=ends)
    engine = open_engine(source, tokenizer)
    model = Model(
        name=NAME.value or source.config.name,
        engine=engine,
        tokenizer=tokenizer,
        num_positions=engine.batch.num_positions,
        most_jobs=MOST_WAITING.value,
        chat=chat,
        grammars=Grammars(tokenizer, vocab_size, ends) if chat is None else chat.grammars,
        sampling=source.generation.sampling,
        ends=ends,
    )
    limits = Limits(
        body_bytes=MOST_BODY_MIB.value << 20,
        request_seconds=REQUEST_SECONDS.value,
        requests_per_minute=REQUESTS_PER_MINUTE.value,
    )
    return Service(model=model, limits=limits)


def open_engine(source: Source, tokenizer: Tokenizer) -> Engine:
    """Read the weights, and compile what decodes them; sizes that cannot be are refused before."""
    mesh = expert_mesh(source.config.model, num_devices=1)
    sizes = {
        "num_rows": BATCH_SIZE.value,
        "num_pages": None if CACHE_TOKENS.value is None else -(-CACHE_TOKENS.value // PAGE_SIZE),
        "num_positions": MOST_POSITIONS.value,
        "num_drafts": NUM_DRAFTS.value,
    }
    try:
        check_opening(source.config, tokenizer, mesh, **sizes)
    except ValueError as error:
        raise ValueError(NAMES.sub(lambda name: FLAGS[name[0]], str(error))) from error
    begun = time.monotonic()
    weights = source.load(mesh)
    print(f"{source.config.name}: weights read in {time.monotonic() - begun:.1f} s", flush=True)
    begun = time.monotonic()
    engine = Engine.open(
        source.config,
        weights,
        tokenizer,
        mesh,
        **sizes,
        drafting_rows=DRAFTING_ROWS.value,
        most_waiting=MOST_WAITING.value,
        seed=SEED.value,
    )
    stats = engine.stats()
    print(
        f"compiled in {time.monotonic() - begun:.1f} s: {stats.rows} texts at once, a cache of"
        f" {stats.pages * PAGE_SIZE:,} tokens, up to {engine.batch.num_positions:,} tokens a text",
        flush=True,
    )
    return engine


def serve(service: "Service", bound: socket.socket, keys: Sequence[str]) -> int | None:
    """Answer requests until a signal comes; return its number."""
    from deepseek_jax.serving.app import make_app
    from deepseek_jax.serving.server import Server, host_names

    hosts = host_names(HOST.value)
    door = make_app(service, keys=keys, hosts=hosts, origins=ALLOW_ORIGIN.value, log=log)
    server = Server(door, service, bound, DRAIN_SECONDS.value)
    return server.run(lambda url: print(f"serving {url}", flush=True), lambda line: print(f"\n{line}", flush=True))


def log(line: str) -> None:
    """Print a line with its time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable_lines(line)}", flush=True)


if __name__ == "__main__":
    command.run(main)
