"""docs/serving.md as it is written: loaded, served by MLflow's own server and scored in one go, in other processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text()
START_S = 180.0


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def example(start):
    (found,) = [block for block in blocks("bash") if block.startswith(start)]
    return found


@pytest.fixture
def environment(registered):
    """Environment of a process that knows the store's address and nothing of this checkout."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSTARTUP")}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{registered[0]}/.rlhf/mlflow.db",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def server(environment, tmp_path):
    """Address of a server that was started by the page's own command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = example("mlflow models serve").strip().replace("5001", port).split()
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                said = (tmp_path / "server.log").read_text()
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(server, body, content_type="application/json"):
    request = urllib.request.Request(
        f"{server}/invocations", body.encode(), {"Content-Type": content_type}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.integration
def test_the_python_example_and_the_batch_command_run_as_written(environment, tmp_path):
    (code,) = blocks("python")
    shown = "\nimport json\nprint(json.dumps([responses, drawn, scores]))\n"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mlflow", "-c", code + shown],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    responses, drawn, scores = json.loads(done.stdout.splitlines()[-1])
    assert [len(answers) for answers in (responses, drawn, scores)] == [2, 2, 2]
    assert all(isinstance(text, str) for text in responses + drawn)
    assert all(isinstance(score, float) for score in scores)
    (tmp_path / "prompts.csv").write_text('prompt\n"please say where the shop is"\n"thank you"\n')
    done = subprocess.run(
        ["bash", "-c", example("mlflow models predict")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "responses.json").read_text())["predictions"] == responses


@pytest.mark.integration
def test_the_server_answers_tables_and_refuses_what_it_does_not_know(server, environment, tmp_path):
    answers = []
    for block in (block for block in blocks("bash") if block.startswith("curl")):
        done = subprocess.run(
            ["bash", "-c", block.replace("http://127.0.0.1:5001", server)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        answers.append(json.loads(done.stdout)["predictions"])
    assert [len(predictions) for predictions in answers] == [2, 1]
    assert all(isinstance(text, str) for predictions in answers for text in predictions)
    both = {"columns": ["prompt"], "data": [["please say where the shop is"], ["thank you"]]}
    for body in ({"dataframe_split": both}, {"inputs": [{"prompt": row[0]} for row in both["data"]]}):
        assert post(server, json.dumps(body)) == (200, {"predictions": answers[0]})
    assert post(server, "prompt\nplease say where the shop is\nthank you\n", "text/csv")[1]["predictions"] == answers[0]

    def refused(row, **params):
        status, told = post(server, json.dumps({"dataframe_records": [row], "params": params}))
        assert status == 400
        return told["message"]

    assert "missing inputs ['prompt']. Note that there were extra inputs: ['promt']" in refused({"promt": "x"})
    assert "unknown column 'temperature' (it is a parameter" in refused({"prompt": "x", "temperature": 1.0})
    assert "unknown column 'more'. Fix: columns are prompt;" in refused({"prompt": "x", "more": "y"})
    assert "unknown parameter 'temprature'. Fix: " in refused({"prompt": "x"}, temprature=1.0)
    assert "parameter temperature is -1.0. Fix: at least 0" in refused({"prompt": "x"}, temperature=-1.0)
    assert "parameter max_new_tokens is 0. Fix: from 1 to " in refused({"prompt": "x"}, max_new_tokens=0)
    assert "row 0: prompt is empty. Fix: give text" in refused({"prompt": " "})
    assert post(server, json.dumps({"dataframe_split": both}))[0] == 200, "a refusal changes nothing"
