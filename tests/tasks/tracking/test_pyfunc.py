"""A registered model is loaded the way a stranger would: by its name, in another process, elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pyfunc import ROWS

from rlhf_core.engine.batches import collate
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.text.tokenizer import decode_response, encode_prompt, encode_response
from tasks.tracking.logged_model import REQUIREMENTS

LOADER = """\
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
rows, params = json.loads(sys.argv[2])
answer = model.predict(rows, params=params) if params else model.predict(rows)
import rlhf_core
meta = model.metadata
example = model.input_example.to_dict(orient="records")
print(json.dumps([answer, rlhf_core.__file__, meta.signature.to_dict(), example]))
"""


def load_elsewhere(checkout, model, rows, params, folder):
    """Predict in a process that knows the store's address and nothing of this checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{checkout}/.rlhf/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADER, f"models:/{model}@candidate", json.dumps([rows, params])],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.integration
def test_a_registered_reward_model_scores(registered, tmp_path):
    checkout, _, reward, tokenizer = registered
    batch = collate(
        [encode_prompt(tokenizer, row["prompt"], 12) for row in ROWS],
        [encode_response(tokenizer, row["response"], 8) for row in ROWS],
        tokenizer.pad_token_id,
    )
    scores, code, signature, example = load_elsewhere(checkout, "rlhf-reward", ROWS, None, tmp_path)
    assert scores == pytest.approx(reward(batch).tolist(), abs=1e-5)
    assert len({round(score, 6) for score in scores}) == 3
    assert Path(code).is_relative_to(checkout / ".rlhf/mlartifacts"), "the code that was logged must be what runs"
    assert [column["name"] for column in json.loads(signature["inputs"])] == ["prompt", "response"]
    assert "double" in signature["outputs"]
    assert example == [ROWS[0]]


@pytest.mark.integration
def test_a_registered_policy_writes(registered, tmp_path):
    checkout, policy, _, tokenizer = registered
    prompts = [{"prompt": row["prompt"]} for row in ROWS[:4]]
    settings = {"temperature": 1.0, "max_new_tokens": 5, "seed": 7}
    import torch

    samples = sample_responses(
        policy,
        [encode_prompt(tokenizer, row["prompt"], 12) for row in prompts],
        Sampling.of(policy, tokenizer, 5),
        temperature=1.0,
        generator=torch.Generator().manual_seed(7),
        batch_size=32,
    )
    expected = [decode_response(tokenizer, ids) for ids in samples.response_ids]
    texts, _, signature, example = load_elsewhere(checkout, "rlhf-policy", prompts, settings, tmp_path)
    assert texts == expected
    params = {param["name"]: param["default"] for param in json.loads(signature["params"])}
    assert params == {"temperature": 0.0, "max_new_tokens": 8, "seed": 0}
    assert example == [{"prompt": ROWS[0]["prompt"]}]


def test_nothing_pickled_is_logged_and_requirements_are_pinned(registered):
    checkout = registered[0]
    artifacts = checkout / ".rlhf/mlartifacts"
    files = [path for path in artifacts.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin", ".pyc")]
    assert len([path for path in files if path.name == "manifest.json" and path.parent.name == "lineage"]) == 2
    for requirements in (path for path in files if path.name == "requirements.txt"):
        lines = requirements.read_text().split()
        assert {line.partition("==")[0] for line in lines} >= set(REQUIREMENTS)
        assert all("==" in line and "+" not in line for line in lines)
