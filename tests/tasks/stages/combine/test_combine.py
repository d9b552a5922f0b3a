"""Combined policies as stages: shares chosen of two and of three members, compared and shown like the others."""

import json
import math
import shutil
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from dvc.repo import Repo
from support.project import change_sections

from rlhf_core.config import CombineConfig
from rlhf_core.errors import Diverged
from rlhf_core.evaluation.policy_measurement import response_logprob_sums
from rlhf_core.models.mixture import PolicyMixture, averaged_weights, load_any_policy
from rlhf_core.models.policy import load_policy
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import load_tokenizer
from tasks import paths
from tasks.frame.definition import stage_definition
from tasks.frame.process import run_stage
from tasks.frame.stage import Stage
from tasks.params import load_params
from tasks.stages.combine import run as combine
from tasks.stages.combine.gain import gain_figures
from tasks.stages.evaluate import run as evaluate
from tasks.stages.report import run as report

BODIES = {"combine": combine.run, "evaluate": evaluate.run, "report": report.run}
WITH_CHAIN = {"algorithms": ["ppo", "dpo", "chain"], "chain": ["dpo", "ppo"]}


def run(project: Path, stage: str) -> int:
    body = BODIES[stage.partition("@")[0]]
    return run_stage(stage, body, load_params(project / "params.yaml"), project)


def figures(project: Path, stage: str) -> Any:
    return json.loads((project / paths.metrics_file(stage)).read_text())


def combined(project: Path, **more: Any) -> None:
    change_sections(
        project, combine={"methods": ["weights", "probabilities"], "members": ["ppo", "dpo"], "pairs": 16} | more
    )


def read_pairs(project: Path) -> tuple[list[Any], list[Any]]:
    """The held-out pairs that choose, and those that measure."""
    params, definition = load_params(project / "params.yaml"), stage_definition(project, "combine@weights")
    stage = Stage(definition, params, project, project, SimpleNamespace(event=lambda *_, **__: None))
    return combine.heldout_pairs(stage, load_tokenizer(project / "artifacts/sft/model"))


def chosen_likelihood(project: Path, policy: Any, measuring: bool = False) -> float:
    """Log-likelihood a token of the held-out chosen responses that the stage read, read here anew."""
    pairs = read_pairs(project)[measuring]
    rows = [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    return response_logprob_sums(policy, *rows, pad_id=0, batch_size=1).sum() / sum(map(len, rows[1]))


def third_member(project: Path) -> None:
    """A chain that ends where the SFT model began."""
    change_sections(project, align=WITH_CHAIN)
    shutil.copytree(project / "artifacts/sft/model", project / "artifacts/align/chain/model")


@pytest.mark.parametrize("names", [["ppo", "dpo"], ["chain", "ppo", "dpo"]])
@pytest.mark.parametrize("method", ["weights", "probabilities"])
def test_the_shares_are_the_best_on_heldout_pairs_and_each_member_is_measured(
    project: Path, names: list[str], method: str
) -> None:
    """Every candidate is read here anew, through the combined model itself."""
    third_member(project)
    combined(project, members=names, parts=5)
    members = [load_policy(project / f"artifacts/align/{name}/model") for name in names]
    assert run(project, f"combine@{method}") == 0
    told = figures(project, f"combine@{method}")
    tried = [tuple(row["shares"][name] for name in names) for row in told["measured"]]
    fifths = {2: [(4, 1), (3, 2), (2, 3), (1, 4)]}.get(
        len(names), [(3, 1, 1), (2, 2, 1), (2, 1, 2), (1, 3, 1), (1, 2, 2), (1, 1, 3)]
    )
    assert tried == [tuple(part / 5 for part in parts) for parts in fifths]
    for shares, row in zip(tried, told["measured"], strict=True):
        made = averaged_weights(members, shares) if method == "weights" else PolicyMixture(members, shares)
        assert row["value"] == pytest.approx(chosen_likelihood(project, made), abs=1e-5)
    chosen = max(told["measured"], key=lambda row: row["value"])
    assert (told["value"], told["shares"]) == (chosen["value"], chosen["shares"])
    for name, member in zip(names, members, strict=True):
        assert told["alone"][name]["value"] == pytest.approx(chosen_likelihood(project, member), abs=1e-5)
    best = max(names, key=lambda name: told["alone"][name]["value"])
    assert told["best_member"] == best
    policy = load_any_policy(project / f"artifacts/align/{method}/model")
    assert told["value"] == pytest.approx(chosen_likelihood(project, policy), abs=1e-5)
    alone = chosen_likelihood(project, members[names.index(best)], measuring=True)
    gained = chosen_likelihood(project, policy, measuring=True) - alone
    assert told["gain_over_best_member"] == pytest.approx(gained, abs=1e-5)
    assert told["gain_over_best_member_low"] <= gained <= told["gain_over_best_member_high"]
    shares = tuple(told["shares"][name] for name in names)
    if isinstance(policy, PolicyMixture):
        assert policy.shares == shares
        best = max(row["value"] for row in (*told["measured"], *told["alone"].values()))
        assert all(row["value"] + row["likelihood_to_gain"] >= best for row in told["measured"])
    else:
        of, made = [dict(member.named_parameters()) for member in members], dict(policy.named_parameters())
        for name in made:
            mean = sum(share * one[name].double() for share, one in zip(shares, of, strict=True))
            assert torch.equal(made[name], mean.float())


def test_pairs_that_measure_the_gain_are_of_prompts_that_did_not_choose(project: Path) -> None:
    combined(project, pairs=1000)
    choose, measure = read_pairs(project)
    of_choice, of_gain = ({tuple(pair.prompt) for pair in half} for half in (choose, measure))
    assert of_choice
    assert not of_choice & of_gain
    assert abs(len(of_choice) - len(of_gain)) <= 1
    assert run(project, "combine@weights") == 0
    told = figures(project, "combine@weights")
    assert (told["num_pairs"], told["num_gain_pairs"]) == (len(choose), len(measure))


def test_choosing_among_equals_gains_nothing_on_average() -> None:
    """Forty policies as good as their members: the best looks better on the pairs that chose it, and nowhere else."""
    rng, seen, gained = np.random.default_rng(0), [], []
    for _ in range(300):
        values = rng.normal(size=(41, 60))  # of each policy on each prompt; the last is the best member
        chosen = int(values[:40, :30].mean(1).argmax())
        seen.append((values[chosen, :30] - values[40, :30]).mean())
        ours, weights = values[:, 30:], np.ones(30)
        found = gain_figures(lambda place, ours=ours, weights=weights: (ours[place], weights), chosen, 40, 30)
        gained.append(found)
    assert np.mean(seen) > 0.3
    assert abs(np.mean([one["gain_over_best_member"] for one in gained])) < 0.05
    inside = np.mean([one["gain_over_best_member_low"] <= 0 <= one["gain_over_best_member_high"] for one in gained])
    assert 0.92 <= inside <= 0.98


def test_a_gain_of_tokens_is_that_of_all_tokens_together() -> None:
    ours, theirs, tokens = (
        np.array([2.0, 4.0, 6.0, 1.0]),
        np.array([1.0, 1.0, 2.0, 1.0]),
        np.array([1.0, 2.0, 4.0, 1.0]),
    )
    found = gain_figures(lambda policy: (policy, tokens), ours, theirs, 7)
    assert found["gain_over_best_member"] == (1 + 3 + 4 + 0) / 8
    assert found["undefined"]["gain_over_best_member_low"] == "too few prompts: 4, an interval needs 5"
    nothing = gain_figures(None, ours, theirs, 0)
    assert nothing["gain_over_best_member"] is None
    assert nothing["undefined"]["gain_over_best_member"] == "all held-out pairs are of one prompt, which chose"


def test_a_mixture_is_chosen_with_one_pass_of_each_member(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = combine.response_token_logprobs
    monkeypatch.setattr(
        combine, "response_token_logprobs", lambda model, **more: asked.append(model) or plain(model, **more)
    )
    combined(project, parts=20)
    assert run(project, "combine@probabilities") == 0
    assert len(asked) == 2
    assert len(figures(project, "combine@probabilities")["measured"]) == 19


@pytest.mark.parametrize(("values", "member"), [([math.nan, -1.0], 0), ([-1.0, -math.inf], 1), ([math.inf, -1.0], 0)])
def test_a_member_whose_value_is_no_number_is_never_the_best(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], values: list[float], member: int
) -> None:
    combined(project, members=["ppo", "dpo"])
    monkeypatch.setattr(combine, "_measure", lambda *_: lambda shares: {"value": values[max(shares) == shares[1]]})
    assert run(project, "combine@weights") == Diverged.exit_code
    assert f"combine: the value of member {member}" in capsys.readouterr().err
    assert not (project / "artifacts/align/weights").exists()


def test_equal_members_count_alike(project: Path) -> None:
    """Nothing tells shares apart, so the most even are taken."""
    third_member(project)
    for name in ("ppo", "dpo"):
        shutil.rmtree(project / f"artifacts/align/{name}/model")
        shutil.copytree(project / "artifacts/sft/model", project / f"artifacts/align/{name}/model")
    combined(project, members=["dpo", "chain", "ppo"], parts=6)
    for method in ("weights", "probabilities"):
        assert run(project, f"combine@{method}") == 0
        told = figures(project, f"combine@{method}")
        assert told["shares"] == dict.fromkeys(("dpo", "chain", "ppo"), 2 / 6)
        assert told["gain_over_best_member"] == pytest.approx(0.0, abs=1e-6)


def test_combined_policies_are_compared_and_shown_like_the_others(project: Path) -> None:
    """By score too; the same run again writes the same bytes; at another temperature than 1 as well."""
    third_member(project)
    combined(project, choose_by="score", members=["ppo", "dpo", "chain"], parts=3, pairs=8)
    change_sections(project, evaluate={"temperatures": [0.7, 0.0]})
    for method in ("weights", "probabilities"):
        assert run(project, f"combine@{method}") == 0
        told = figures(project, f"combine@{method}")
        assert told["value"] == pytest.approx(told["choice_score"] - 0.1 * told["choice_kl_to_sft"])
        before = tree_digest(project / f"artifacts/align/{method}")
        assert run(project, f"combine@{method}") == 0
        assert tree_digest(project / f"artifacts/align/{method}") == before
    assert run(project, "evaluate") == 0
    told = figures(project, "evaluate")
    for name in ("weights", "probabilities"):
        assert told[name]["wins"] + told[name]["ties"] + told[name]["losses"] == told["num_prompts"]
        assert told[name]["lengths"].keys() == {"T=0.7", "T=0"}
        assert told[name]["kl_to_sft"] is not None
    assert run(project, "report") == 0
    page = (project / "reports/html/report.html").read_text()
    assert "Averaged weights" in page
    assert "Mixed probabilities" in page


def test_dvc_and_the_stage_read_the_same_of_the_graph(project: Path) -> None:
    """Matrix items, and members that stand in a list of parameters."""
    combined(project, members=["chain", "dpo"])
    change_sections(project, align=WITH_CHAIN)
    with Repo.init(str(project), no_scm=True, force=True) as repo:
        stages = {stage.name: stage for stage in repo.index.stages if hasattr(stage, "cmd")}
    assert {"align@chain", "combine@weights", "combine@probabilities"} <= stages.keys()
    for name in ("align@chain", "combine@weights", "evaluate"):
        deps = {str(dep.def_path) for dep in stages[name].deps if "params.yaml" not in str(dep.def_path)}
        assert deps == set(stage_definition(project, name).deps)
    assert "artifacts/align/chain" in stage_definition(project, "combine@weights").deps
    assert stage_definition(project, "combine@weights").deps.count("artifacts/align/dpo") == 1
    assert stage_definition(project, "combine@weights").outs[0] == "artifacts/align/weights"


def test_every_member_is_an_input_however_many_there_are(project: Path) -> None:
    """`dvc.yaml` names places of the list; one algorithm more than it has places for would be read unnoticed."""
    (kinds, _) = get_args(CombineConfig.model_fields["members"].annotation)
    change_sections(project, align=WITH_CHAIN)
    for names in permutations(get_args(kinds)):
        combined(project, members=list(names))
        definition = stage_definition(project, "combine@weights")
        assert {f"artifacts/align/{name}" for name in names} < set(definition.deps)
    with Repo.init(str(project), no_scm=True, force=True) as repo:
        (stage,) = (stage for stage in repo.index.stages if getattr(stage, "addressing", "") == "combine@weights")
        deps = {str(dep.def_path) for dep in stage.deps if "params.yaml" not in str(dep.def_path)}
    assert deps == set(definition.deps)


def test_without_methods_there_is_no_such_stage(project: Path) -> None:
    with Repo.init(str(project), no_scm=True, force=True) as repo:
        names = {stage.name for stage in repo.index.stages if hasattr(stage, "cmd")}
    assert not [name for name in names if name.startswith("combine")]
    assert "align@chain" not in names
