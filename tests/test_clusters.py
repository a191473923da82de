"""The examples of docs/clusters.md: their flags exist, and they start again after the ends that the table says."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "clusters.md").read_text()
SCRIPT = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)[1]
YAML = [part for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) for part in yaml.safe_load_all(block)]
SERVICE, JOB, JOB_SET = YAML
AGAIN = {0: False, 2: False, 1: True, 75: True, 134: True, 137: True, 129: True, 130: True, 138: True, 143: True}

# srun ends as the test says; scontrol writes down what it is asked for
STAND_INS = 'srun() { return "$CODE"; }; scontrol() { echo "scontrol $*"; }\n'


def test_the_table_has_every_exit_code():
    rows = re.findall(r"^\| ([\d, ]+) \| .* \| (no|yes)\b", PAGE, re.MULTILINE)
    assert {int(code): word == "yes" for codes, word in rows for code in codes.split(",")} == AGAIN


@pytest.mark.parametrize("code", AGAIN)
@pytest.mark.parametrize("restarts", ["", "19", "20"])
def test_slurm_starts_again_what_can_go_on(code, restarts):
    variables = {"CODE": str(code), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts, "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(["bash", "-c", STAND_INS + SCRIPT], env=variables, capture_output=True, text=True)
    assert ended.returncode == code and not ended.stderr
    assert ended.stdout == ("scontrol requeue 7\n" if AGAIN[code] and restarts != "20" else "")


@pytest.mark.parametrize("job", [JOB["spec"], JOB_SET["spec"]["replicatedJobs"][0]["template"]["spec"]])
def test_kubernetes_starts_again_what_can_go_on(job):
    failing = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert [rule["onExitCodes"]["values"] for rule in failing] == [[2]]
    counted = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "Count"]
    assert all(set(codes["values"]) == {code for code, again in AGAIN.items() if again} for codes in counted)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # a policy by exit code needs it
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert f"--num_processes={job['completions']} " in container["args"][0]
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in failing)
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]


def test_pods_have_the_names_that_the_coordinator_is_called_by():
    host, _, domain = re.search(r"--coordinator=(\S+):", str(JOB))[1].partition(".")
    assert host == f"{JOB['metadata']['name']}-0"
    assert domain == JOB["spec"]["template"]["spec"]["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    (workers,) = JOB_SET["spec"]["replicatedJobs"]
    name = JOB_SET["metadata"]["name"]
    assert f"--coordinator={name}-{workers['name']}-0-0.{name}:" in str(JOB_SET)


def test_the_flags_exist():
    sources = "".join((ROOT / "experiments" / name).read_text() for name in ("session.py", "train.py"))
    commands = re.findall(r"python -m experiments\.train ([^']*?)(?=\ncode|')", f"{SCRIPT}{YAML}")
    assert len(commands) == 3
    for command in commands:
        flags = re.findall(r"--([a-z_.]+)[ =]", command)
        assert len(flags) > 3
        assert [flag for flag in flags if not flag.startswith("config") and f'"{flag}"' not in sources] == []
