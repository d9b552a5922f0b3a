"""Demonstrations and comparisons with tools, from files through every stage that learns from them."""

import json
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_project
from support.project import change_sections, edited_yaml
from support.templates import TOOLS, tokenizer_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf_core.text.tokenizer import load_tokenizer
from rlhf_core.text.transcripts import prompt_turns
from tasks.frame.process import run_stage
from tasks.params import load_params

THINGS = ("lamp", "rake", "bed", "rug", "saw", "pot", "cup", "desk", "vase", "sofa", "fan", "jug", "bowl", "hose")
MODEL = {"source": "folder", "path": "models/own", "max_prompt_tokens": 900, "max_response_tokens": 120}


def asked(thing: str, number: int) -> list[dict[str, Any]]:
    call = {"id": f"call_{number}", "function": {"name": "stock", "arguments": json.dumps({"item": thing})}}
    return [
        {"role": "user", "content": f"How many of the {thing} can I have, if {thing} is what I want?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": json.dumps({"left": number}), "tool_call_id": f"call_{number}"},
    ]


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project whose only data are dialogues with tools, and a folder of its own whose template writes them."""
    folder = make_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    tokenizer = tokenizer_of("Llama 3")
    tokenizer.save_pretrained(folder / "models/own")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1200, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "models/own")
    numbered = list(enumerate(THINGS, start=2))
    demonstrations = [
        {"messages": [*asked(thing, number), reply(f"{number} of them.")], "tools": TOOLS} for number, thing in numbered
    ]
    comparisons = [
        {"prompt": asked(thing, number), "chosen": [reply(f"{number} of them.")], "rejected": [reply("None at all.")],
         "tools": json.dumps(TOOLS)}
        for number, thing in numbered
    ]  # fmt: skip
    for kind, rows in (("demonstrations", demonstrations), ("comparisons", comparisons)):
        (folder / f"data/{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with edited_yaml(folder / "params.yaml") as params:
        params["data"] = {kind: f"data/{kind}.jsonl" for kind in ("demonstrations", "comparisons")}
        params["data"]["heldout_share"] = 0.3
    change_sections(
        folder,
        model=MODEL,
        label={"source": "file"},
        sft={"max_steps": 2, "heldout_share": 0.0},
        reward={"epochs": 1, "min_pairwise_accuracy": 0.0},
    )
    yield folder
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def run(project: Path, *stages: str) -> None:
    params = load_params(project / "params.yaml")
    for stage in stages:
        body = import_module(f"tasks.stages.{stage.partition('@')[0]}.run").run
        assert run_stage(stage, body, params, project) == 0, stage


def figures(project: Path, stage: str) -> dict[str, Any]:
    return json.loads((project / f"reports/metrics/{stage}.json").read_text())


def test_calls_and_answers_pass_every_stage(project: Path) -> None:
    run(project, "validate")
    validated = figures(project, "validate")
    assert validated["rows_bad"] == 0
    rows = pq.read_table(project / "artifacts/validate/demonstrations.parquet").to_pylist()
    assert [turn["role"] for turn in prompt_turns(rows[0]["prompt"])] == ["user", "assistant", "tool"]

    run(project, "sft", "generate", "label", "preferences", "reward", "align@dpo")
    trained = [row for row in rows if row["split"] == "train"]
    said = figures(project, "sft")
    assert (said["prompts_encoded"], said["responses_encoded"]) == (2 * len(trained), 2 * len(trained))
    for stage in ("sft", "reward", "align-dpo"):
        counted = figures(project, stage)
        assert (counted["prompts_rewritten"], counted["responses_rewritten"]) == (0, 0)
        assert (counted["prompts_cut"], counted["responses_cut"]) == (0, 0)
    pairs = pq.read_table(project / "artifacts/preferences/train.parquet").to_pylist()
    assert {row["prompt"] for row in pairs} <= {row["prompt"] for row in rows}
    assert figures(project, "align-dpo")["pairs_encoded"] == len(pairs) > 0
    assert load_tokenizer(project / "artifacts/sft/model").chat_template
