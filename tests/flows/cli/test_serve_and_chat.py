"""`rlhf serve` and `rlhf chat` as processes: exit codes, signals, what they print, and vLLM behind the same command."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import httpx
import pytest
from support.served import write_models

from flows.cli.app import run_command
from flows.serving.server import is_loopback_address
from tests.conftest import made_once
from tests.flows.conftest import plain_environment

KEY = "a-key-of-more-than-16-letters"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    return made_once(tmp_path_factory, "served", write_models)


def rlhf(*arguments, cwd, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.app", *map(str, arguments)], cwd=cwd, input=stdin, capture_output=True,
        env=plain_environment() | environment, text=True, timeout=120, check=False,
    )  # fmt: skip


def started(*arguments, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.app", *map(str, arguments)], cwd=cwd, env=plain_environment() | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def command(model_folders, monkeypatch, capsys):
    """Runs a command in this process; its exit code and what it complained of."""
    monkeypatch.chdir(model_folders)
    monkeypatch.delenv("RLHF_API_KEY", raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        code = run_command([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.integration
def test_where_a_shell_has_background_programs_ignore_ctrl_c_it_ends_with_its_code_all_the_same(model_folders):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a program inherits
    try:
        process = started("serve", "policy", "--port", "0", "--device", "cpu", cwd=model_folders, RLHF_API_KEY=KEY)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout.readline().startswith("policy: http://")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    finally:
        process.kill()


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_server_answers_until_a_signal_and_ends_with_its_code(model_folders, number, code):
    process = started(
        "serve", "policy", "reward", "--port", "0", "--device", "cpu", cwd=model_folders, RLHF_API_KEY=KEY
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("policy, reward: http://127.0.0.1:"), process.stderr.read()
        address = line.split()[-1]
        headers = {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{address}/models").status_code == 401
        body = {"model": "policy", "messages": [{"role": "user", "content": "A question?"}], "max_tokens": 3}
        answer = httpx.post(f"{address}/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] > 0
        process.send_signal(number)
        said, complained = process.communicate(timeout=60)
        assert process.returncode == code
        assert KEY not in line + said + complained
        assert "Traceback" not in complained
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve"], 2, "no version"),
        (["serve", "nothing-here"], 2, "no folder, and no registered version. Fix:"),
        (["serve", "policy", "--host", "0.0.0.0"], 2, "there is no key. Fix: RLHF_API_KEY"),
        (["serve", "policy", "--rows", "0"], 2, "--rows 0: must be at least 1"),
        (["serve", "policy", "policy", "--port", "0"], 2, "served already"),
        (["serve", "policy", "--api-key-file", "missing"], 7, "cannot be read"),
        (["serve", "policy", "--api-key-file", "short"], 2, "key 1: not at least 16"),
        (["serve", "policy", "--vllm-argument=--x"], 2, "needs --engine vllm"),
        (["chat", "reward"], 2, "a reward model scores and does not talk"),
        (["chat", "policy", "--votes", "v.jsonl"], 2, "need --against"),
        (["chat", "policy", "--against", "policy"], 2, "both are policy"),
        (["chat", "policy", "--against", "plain", "--annotator", "../x"], 2, "letters, digits"),
        (["chat", "policy", "--against", "plain", "--votes", "v.csv"], 2, "ends with .jsonl"),
        (["chat", "policy", "--temperature", "3"], 2, "from 0 to 2"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_an_exit_code(command, model_folders, arguments, code, words):
    (model_folders / "short").write_text("# keys\nshort\n")
    found, said = command(*arguments)
    lines = [line for line in said.splitlines() if not line.startswith("loading ")]
    assert (found, len(lines)) == (code, 1), said
    assert words in lines[0]


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = command("serve", "policy", "--port", taken.getsockname()[1])
    assert code == 7
    assert "cannot listen there" in said
    assert "loading" not in said


@pytest.mark.integration
def test_chat_reads_a_pipe_and_keeps_votes(model_folders, tmp_path):
    done = rlhf("chat", model_folders / "policy", "--seed", 1, "--max-tokens", 5, cwd=tmp_path, stdin="A?\n/new\nB?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("policy> ") == 2
    typed = "".join(f"Question {number}?\na\n" for number in range(6))
    asked = ["chat", model_folders / "policy", "--against", model_folders / "plain", "--annotator", "ann", "--seed", 1]
    done = rlhf(*asked, cwd=tmp_path, stdin=typed)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / "votes/ann.jsonl").read_text().splitlines()]
    assert kept
    assert f"{len(kept)} votes in {tmp_path}/votes/ann.jsonl" in done.stdout


STAND_IN = """#!{python}
import json, os, signal, sys, time
json.dump({{"arguments": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"),
            "files": sorted(os.listdir(sys.argv[2]))}}, open("{record}", "w"))
signal.signal(signal.SIGTERM, lambda *_: (open("{record}.ended", "w").close(), sys.exit(0)))
time.sleep({seconds})
sys.exit(5)
"""


@pytest.fixture
def vllm(tmp_path):
    """Makes a stand-in for vLLM that notes how it was called; returns the environment and its record."""

    def make(seconds):
        record = tmp_path / "record.json"
        program = tmp_path / "bin/vllm"
        program.parent.mkdir()
        program.write_text(STAND_IN.format(python=sys.executable, record=record, seconds=seconds))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}, record

    return make


def test_vllm_is_started_on_the_folder_with_its_own_options_and_its_code_is_ours(model_folders, vllm):
    environment, record = vllm(0)
    more = ["--context", 300, "--port", 8123, "--precision", "bfloat16", "--vllm-argument=--seed=3"]
    done = rlhf("serve", "policy", "--engine", "vllm", *more, cwd=model_folders, RLHF_API_KEY=KEY, **environment)
    assert done.returncode == 5, done.stderr
    noted = json.loads(record.read_text())
    assert noted["arguments"] == [
        "serve", "policy", "--served-model-name", "policy", "--max-model-len", "300", "--host", "127.0.0.1",
        "--port", "8123", "--dtype", "bfloat16", "--seed=3",
    ]  # fmt: skip
    assert noted["key"] == KEY
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(noted["files"])


def test_vllm_ends_with_the_command(model_folders, vllm):
    environment, record = vllm(60)
    process = started("serve", "policy", "--engine", "vllm", cwd=model_folders, **environment)
    deadline = time.monotonic() + 60
    while not record.exists() or not record.read_text().endswith("}"):
        assert time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert record.with_name("record.json.ended").exists()


@pytest.mark.parametrize(
    ("versions", "code", "words"),
    [(["policy"], 7, "vllm: not installed here"), (["policy", "plain"], 2, "serves one version")],
)
def test_vllm_that_is_not_there_or_cannot_is_said(command, monkeypatch, versions, code, words):
    monkeypatch.setenv("PATH", "/nowhere")
    found, said = command("serve", *versions, "--engine", "vllm")
    assert found == code
    assert words in said


def test_vllm_knows_no_reward_heads_of_ours(command, monkeypatch, vllm):
    monkeypatch.setenv("PATH", vllm(0)[0]["PATH"])
    code, said = command("serve", "reward", "--engine", "vllm")
    assert code == 2
    assert "vLLM knows neither reward heads" in said


def test_loopback_is_this_machine_alone():
    assert all(map(is_loopback_address, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback_address, ("0.0.0.0", "::", "192.168.1.5", "example.org", "127.1.example.org")))
