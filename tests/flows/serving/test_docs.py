"""docs/serving.md as it is written: its requests to `rlhf serve` are sent and answered."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.served import load, serving

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text()
HERE = "http://127.0.0.1:8000"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def address(model_folders):
    found = load(model_folders, "policy", "reward")
    names = {"rlhf-policy@champion": found["policy"], "rlhf-reward@champion": found["reward"]}
    with serving(names) as address:
        yield address


def test_the_curl_examples_are_answered(address):
    found = {}
    for block in (block for block in blocks("sh") if block.startswith("curl")):
        done = subprocess.run(
            ["bash", "-c", block.replace(HERE, address)], capture_output=True, text=True, check=True,
            env={**os.environ, "no_proxy": "127.0.0.1"},
        )  # fmt: skip
        answer = json.loads(done.stdout)
        found[answer["object"]] = answer
    assert set(found) == {"chat.completion", "list"}
    assert 0 < found["chat.completion"]["usage"]["completion_tokens"] <= 20
    assert [row["index"] for row in found["list"]["data"]] == [0, 1]


def test_the_example_of_openais_client_is_answered(address):
    if importlib.util.find_spec("openai") is None:
        pytest.skip("left out: the `openai` client is not installed (extra `dev`)")
    (code,) = blocks("py")
    done = subprocess.run(
        [sys.executable, "-c", code.replace(HERE, address)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *_, tokens, score = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ tokens", tokens)
    assert abs(float(score)) < 100


def test_every_option_of_the_command_is_on_the_page():
    from flows.cli.serve import ServeOptions

    lacking = [name for name in vars(ServeOptions()) if f"--{name.replace('_', '-')}" not in PAGE]
    assert not lacking
