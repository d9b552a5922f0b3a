"""Settings that contradict each other, the models or the installation are refused in one line, before training."""

import re
import sys
from pathlib import Path

import pytest
import torch
from support.project import change_sections

from rlhf_core.config.lora import LoraConfig
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.adapters import add_adapters
from rlhf_core.text.tokenizer import train_tokenizer
from tasks.frame.process import run_stage
from tasks.params import check_params, load_params, parse_yaml
from tasks.stages.align import run as align

CONTRADICTIONS = {
    "align: {algorithms: [chain], chain: [dpo]}": "algorithm 'chain' needs two links or more",
    "align: {ppo: {advantages: {method: rloo, truncated: bootstrap}, responses_per_prompt: 2}}": "has no values",
    "align: {algorithms: [ppo, ppo]}": "algorithms: one stands there twice; keep it once",
    "align: {chain: {links: [dpo, ipo], ipo: {loss: kto}}}": "align.chain.ipo.loss",
    "combine: {members: [ppo, dpo, ppo]}": "members: one stands there twice; keep it once",
    "combine: {methods: [weights], members: [ppo, chain]}": "names chain, which align.algorithms does not",
    "combine: {members: [ppo, dpo, chain], parts: 2}": "parts 2 of 3 members: one part at least for each",
    "combine: {shares: [0.5]}": "params.yaml:1: combine: `shares` became `parts`, for any number of members",
    "model: {hidden_size: 30, heads: 4}": "heads 4 must divide hidden_size 30",
    "model: {source: folder}": "source 'folder' needs `path`",
    "sft: {batch_size: 9, accumulation: 2}": "accumulation 2 must divide batch_size 9",
}


@pytest.mark.parametrize("text", CONTRADICTIONS)
def test_a_contradiction_in_params_yaml_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(CONTRADICTIONS[text])):
        check_params(parse_yaml(text, "params.yaml"), "params.yaml")


def test_a_chain_may_be_a_bare_list() -> None:
    params = check_params(parse_yaml("align: {algorithms: [chain], chain: [dpo, ppo]}", "p"), "p")
    assert params.align.chain.links == ("dpo", "ppo")


def test_a_guard_that_reads_other_tokens_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project / "artifacts/reward/model"
    train_tokenizer(["other words altogether"], 300).save_pretrained(folder)
    guard = {"every": 1, "scorer": "artifacts/reward/model", "prompts": 4}
    change_sections(project, align={"ppo": {"guard": guard}})
    assert run_stage("align@ppo", align.run, load_params(project / "params.yaml"), project) == 2
    said = capsys.readouterr().err
    assert "align.ppo.guard.scorer: artifacts/reward/model has another tokenizer than the policy. Fix:" in said


def test_adapters_without_peft_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentProblem, match=r"peft is not installed\. Fix: pip install peft"):
        add_adapters(torch.nn.Module(), LoraConfig(), 0)  # type: ignore[arg-type]
