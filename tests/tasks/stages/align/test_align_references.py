"""What an alignment counts its divergence from: under adapters, in chains, and on disk between runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.project import change_sections

from rlhf_core.models.policy import load_policy
from tasks.frame.definition import stage_definition
from tasks.frame.process import run_stage
from tasks.frame.stage import Stage
from tasks.params import load_params
from tasks.stages.align import dpo as align_dpo
from tasks.stages.align import run as align
from tasks.stages.align.dpo import reference_cache
from tasks.stages.combine import run as combine

SHORT = {"epochs": 1, "prompts_per_step": 5, "learning_rate": 0.01, "warmup_steps": 0}
LINKS = {"links": ["dpo", "ipo"], "dpo": SHORT, "ipo": SHORT}


def run(project: Path, stage: str, **sections: dict[str, Any]) -> Any:
    """Run a stage in this process and return its figures."""
    change_sections(project, **sections)
    body = align.run if stage.startswith("align") else combine.run
    assert run_stage(stage, body, load_params(project / "params.yaml"), project) == 0
    return json.loads((project / f"reports/metrics/{stage.replace('@', '-')}.json").read_text())


def chain(**more: Any) -> dict[str, Any]:
    return {"algorithms": ["ppo", "dpo", "chain"], "chain": LINKS | more}


@pytest.mark.parametrize("reference", ["previous", "sft"])
def test_a_link_of_adapters_counts_from_where_it_is_told_to(project: Path, reference: str) -> None:
    """One set of adapters goes through all links: set aside they are the SFT model, folded in the link before."""
    lora = {"rank": 4, "stages": ["align"]}
    told = run(project, "align@chain", align=chain(reference=reference), model={"lora": lora})
    first, second = told["links"]
    lines = (project / "reports/plots/align-chain.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    begun = [abs(float(row["implicit_reward/margin"])) for row in (rows[0], rows[first["steps"]])]
    assert begun[0] == 0.0
    if reference == "previous":
        assert begun[1] < 1e-4, "folded-in adapters differ from adapters by rounding only"
    else:
        assert begun[1] > 1e-3
    assert first["train_kl_to_sft"] != 0.0
    assert second["train_kl_to_sft"] != first["train_kl_to_sft"]


def test_a_link_that_the_guard_ends_says_so(project: Path) -> None:
    guard = {"every": 1, "scorer": "rlhf_core.evaluation.judges:gold_scores", "prompts": 4, "max_kl": 0.0001}
    ppo = {"steps": 4, "rollout_batch": 4, "minibatch": 4, "save_every": 2, "warmup_steps": 0, "guard": guard}
    first, second = run(project, "align@chain", align=chain(links=["ppo", "dpo"], ppo=ppo))["links"]
    assert (first["ended_by"], second["ended_by"]) == ("guard", "last step")
    assert first["train_kl_to_sft"] == 0.0, "it went back to the policy it began with"
    assert second["train_kl_to_sft"] != 0.0


def test_links_that_have_ended_are_not_trained_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(project, "align@chain", align=chain())["links"][0]["steps"]
    monkeypatch.setenv("RLHF_FAULT", f"train.step@{first + 2}:raise")
    with pytest.raises(RuntimeError, match="fault ordered"):
        run(project, "align@chain")
    monkeypatch.delenv("RLHF_FAULT")
    run(project, "align@chain")
    events = [json.loads(line) for line in (project / ".rlhf/progress/align-chain.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "progress"]
    assert steps[0] > first
    assert steps == list(range(steps[0], steps[0] + len(steps)))


def test_a_member_that_is_the_sft_model_has_no_divergence_from_it(project: Path) -> None:
    """What `choose_by: score` charges is measured from the SFT model, and on the policy's own responses."""
    shutil.rmtree(project / "artifacts/align/ppo/model")
    shutil.copytree(project / "artifacts/sft/model", project / "artifacts/align/ppo/model")
    more = {"methods": ["probabilities"], "members": ["ppo", "dpo"], "pairs": 8, "choose_by": "score", "parts": 2}
    told = run(project, "combine@probabilities", combine=more)
    assert told["num_pairs"] == 8
    assert told["alone"]["ppo"]["choice_kl_to_sft"] == 0.0
    assert told["alone"]["dpo"]["choice_kl_to_sft"] != 0.0
    assert told["measured"][0]["choice_kl_to_sft"] != told["alone"]["dpo"]["choice_kl_to_sft"]


def test_members_with_other_vocabularies_are_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = load_policy(project / "artifacts/align/ppo/model")
    rows = policy.get_input_embeddings().weight.shape[0]
    policy.resize_token_embeddings(rows + 3)
    policy.save_pretrained(project / "artifacts/align/ppo/model")
    change_sections(project, combine={"methods": ["probabilities"], "members": ["ppo", "dpo"]})
    assert run_stage("combine@probabilities", combine.run, load_params(project / "params.yaml"), project) == 2
    said = capsys.readouterr().err
    assert f"combine.members: vocabularies of [{rows}, {rows + 3}] tokens. Fix: members from one SFT model" in said


def cached_under(project: Path) -> str:
    """Name of the file that holds what the SFT model says of some rows."""
    params, definition = load_params(project / "params.yaml"), stage_definition(project, "align@dpo")
    progress: Any = None
    stage = Stage(definition, params, project, project, progress)
    return reference_cache(stage, load_policy(project / "artifacts/sft/model")).path("rows").name


def move_a_weight(project: Path) -> None:
    policy = load_policy(project / "artifacts/sft/model")
    with torch.no_grad():
        next(policy.parameters())[0, 0] += 1e-6
    policy.save_pretrained(project / "artifacts/sft/model")


def append_to(name: str) -> Callable[[Path], None]:
    def change(project: Path) -> None:
        with (project / name).open("a") as file:
            file.write("\n")

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "a weight": move_a_weight,
    "the tokenizer": append_to("artifacts/sft/model/tokenizer.json"),
    "cutting": lambda project: change_sections(project, model={"max_response_tokens": 55}),
    "precision": lambda project: change_sections(project, compute={"precision": "bfloat16"}),
    "threads": lambda project: change_sections(project, compute={"threads": 3}),
    "code of models": append_to("rlhf_core/engine/packed.py"),
    "code of log-probabilities": append_to("rlhf_core/rollout/logprobs.py"),
    "code that asks": append_to("rlhf_core/trainers/preference/reference.py"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_n37_a_stage_keeps_reference_logprobs_apart_by_all_they_depend_on(project: Path, changed: str) -> None:
    before = cached_under(project)
    assert cached_under(project) == before
    change_sections(project, align={"dpo": {"beta": 0.7, "loss": "hinge"}})
    assert cached_under(project) == before, "what is done with them does not change them"
    CHANGES[changed](project)
    assert cached_under(project) != before


def test_n37_another_version_of_a_library_does_not_find_them(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached_under(project)
    monkeypatch.setattr(align_dpo, "environment", lambda *_: {"torch": "9.9"})
    assert cached_under(project) != before
