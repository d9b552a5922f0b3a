"""Settings that contradict each other, the models or the installation are refused in one line, before training."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project_support import change_sections
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlhf_core.config import PPOConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.tokenizer import train_tokenizer
from tasks import align
from tasks.align_ppo import value_model
from tasks.frame import run_stage
from tasks.params import check_params, load_params, parse_yaml

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


def test_a_shared_trunk_needs_a_plain_output_layer() -> None:
    """Gemma 2 holds its logits below a cap, so they are no plain product of the states that a head beside reads."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    policy = Gemma2ForCausalLM(Gemma2Config(vocab_size=20, num_key_value_heads=1, **sizes))
    cfg, unused = PPOConfig.model_validate({"value": {"model": "shared"}}), object()
    nothing: Any = unused
    with pytest.raises(ConfigError, match=r"align\.ppo\.value\.model: shared: not with a gemma2 model\. Fix: separate"):
        value_model(nothing, cfg, "align.ppo", policy, nothing)


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
