"""A checkout in miniature for the tests of the record: one commit, a lock, a model folder, a store of its own."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_core.config import Params
from tasks.tracking import Recorder

STAGE = "align@ppo"
MODEL = Path("artifacts/align/ppo/model")
RESPONSES = Path("artifacts/evaluate/responses.parquet")

DVC_FILE = """\
stages:
  reward:
    cmd: "true"
    deps: [code.py]
    outs: [artifacts/reward]
    metrics: [reports/metrics/reward.json]
  align:
    matrix: {algorithm: [ppo]}
    cmd: "true"
    deps: [code.py, artifacts/reward]
    outs: ["artifacts/align/${item.algorithm}"]
"""
DVC_LOCK = """\
schema: '2.0'
stages:
  align@ppo:
    cmd: "true"
    deps: [{path: artifacts/reward}, {path: code.py}]
    outs: [{path: artifacts/align/ppo}]
  reward:
    cmd: "true"
    deps: [{path: code.py}]
    outs: [{path: artifacts/reward}, {path: reports/metrics/reward.json}]
"""


def git(root: Path, *arguments: str) -> str:
    """Run git with an identity of its own."""
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def make_checkout(root: Path, store: Path) -> Path:
    """Make a checkout whose stages have run, with a copy of the empty MLflow store `store`."""
    root.mkdir(parents=True)
    files = {
        ".gitignore": "/.rlhf/\n/artifacts/\n/reports/\n",
        "params.yaml": "seed: 1\ncompute:\n  threads: 2\n",
        "dvc.yaml": DVC_FILE,
        "dvc.lock": DVC_LOCK,
        "code.py": "print('training')\n",
        "reports/metrics/reward.json": json.dumps(
            {"pairwise_accuracy": 0.88, "pairwise_accuracy_low": 0.86, "spearman": 0.9, "spearman_low": 0.88}
        ),
        "artifacts/reward/model/weights": "reward weights",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    write_model(root, "first")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "start")
    (root / ".rlhf").mkdir()
    shutil.copyfile(store, root / ".rlhf/mlflow.db")
    return root


def write_model(root: Path, content: str) -> None:
    """Publish another model, as a stage does: the old folder is replaced, not written into."""
    shutil.rmtree(root / MODEL, ignore_errors=True)
    (root / MODEL).mkdir(parents=True)
    (root / MODEL / "weights").write_text(content)


def write_responses(root: Path, scores: list[float], model: str = "ppo") -> None:
    """What the evaluation leaves: one answer a prompt at temperature 1, graded."""
    rows = [
        {"model": model, "temperature": 1.0, "prompt_id": f"p{number}", "prompt": f"say {number}", "response": "said",
         "gold": score, "reward_model": -score}
        for number, score in enumerate(scores)
    ]  # fmt: skip
    (root / RESPONSES).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / RESPONSES)


def record_policy(root: Path, run: str, content: str, *, scores: list[float], **figures: float | None) -> str:
    """Record a run that made a policy with these figures; returns its outputs hash."""
    write_model(root, content)
    write_responses(root, scores)
    with Recorder(root, run) as recorder:
        recorder.start_stage(STAGE)
        key = recorder.register(STAGE, MODEL, {"reward": 1.0})
        recorder.finish_stage(STAGE)
        recorder.attach(STAGE, key, {"win_rate_low": 0.7, "kl_to_sft": 3.0, "kl_to_sft_high": 3.2, **figures})
        recorder.attach_responses(STAGE, key, RESPONSES, rows_of="ppo")
        recorder.set_candidates({STAGE: key})
    assert recorder.delivery.problem is None
    assert recorder.delivery.refused == ()
    return key


def gated(**gates: Any) -> Params:
    """Parameters with these gates."""
    return Params.model_validate({"gates": gates})
