"""`experiments.serve` as a process: from a folder to an answer, and to its end."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.experiments.test_model_source import write_folder

ROOT = Path(__file__).parents[2]


def ask(url, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_a_folder_is_served_until_the_signal(tmp_path):
    folder = write_folder(tmp_path, "base")
    flags = [f"--hf={folder}", "--port=0", "--batch_size=1", "--most_positions=64", "--name=small"]
    command = [sys.executable, "-m", "experiments.serve", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("serving "))
            url = line.split()[1]
            assert ask(url, "/v1/models")["data"][0]["max_model_len"] == 64
            body = {"model": "small", "prompt": "abc", "max_tokens": 5, "ignore_eos": True}
            assert ask(url, "/v1/completions", body)["usage"]["completion_tokens"] == 5
            chat = ask(url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]})
            assert chat["choices"][0]["message"]["role"] == "assistant"
            process.send_signal(signal.SIGTERM)
            assert process.wait(600) == 128 + signal.SIGTERM
        finally:
            process.kill()
