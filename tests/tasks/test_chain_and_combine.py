"""Chains of algorithms and combined policies, as stages: broken off anywhere, switched, compared, loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.repo import Repo
from project_support import change_sections, edited_yaml

from rlhf_core.evaluation.drift import summed_logprobs
from rlhf_core.models.mixture import PolicyMixture, load_any_policy
from rlhf_core.models.policy import load_policy
from rlhf_core.models.tokenizer import load_tokenizer
from rlhf_core.state import faults
from rlhf_core.state.atomic import tree_digest
from rlhf_core.trainers import reference
from tasks import align, align_chain, combine, evaluate, paths, report
from tasks.definition import stage_definition
from tasks.frame import run_stage
from tasks.params import load_params
from tasks.stage import Stage

BODIES = {"align": align.run, "combine": combine.run, "evaluate": evaluate.run, "report": report.run}
SHORT = {"epochs": 1, "prompts_per_step": 5, "save_every": 3}
CHAIN = {
    "links": ["dpo", "ppo", "ipo"],
    "dpo": SHORT,
    "ipo": SHORT,
    "ppo": {"steps": 4, "rollout_batch": 8, "minibatch": 4, "save_every": 3},
}


def chain(project: Path, **more: Any) -> None:
    change_sections(project, align={"algorithms": ["ppo", "dpo", "chain"], "chain": CHAIN | more})


def run(project: Path, stage: str) -> int:
    body = BODIES[stage.partition("@")[0]]
    return run_stage(stage, body, load_params(project / "params.yaml"), project)


def figures(project: Path, stage: str) -> Any:
    return json.loads((project / paths.metrics_file(stage)).read_text())


def results(project: Path, stage: str) -> dict[str, str]:
    files = tree_digest(project / paths.stage_output(stage))
    return files | {
        path: (project / path).read_text() for path in map(str, (paths.metrics_file(stage), paths.plots_file(stage)))
    }


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[tuple[float, float]]], list[int]]:
    """Replaces what the switch measures by (KL, score) pairs in order, the last one again and again."""

    def script(values: list[tuple[float, float]]) -> list[int]:
        asked: list[int] = []

        def measure(self: Any, policy: Any) -> dict[str, float]:
            kl, score = values[min(len(asked), len(values) - 1)]
            asked.append(1)
            return {"kl_to_sft": kl, "score": score}

        monkeypatch.setattr(align_chain.Yardstick, "__call__", measure)
        return asked

    return script


def test_a_chain_goes_on_from_each_link_and_counts_all_steps(project: Path) -> None:
    """With `previous` the second preference link starts as its own reference, with `sft` it does not."""
    chain(project, links=["dpo", "ipo"], reference="previous")
    assert run(project, "align@chain") == 0
    told = figures(project, "align@chain")
    steps = [link["steps"] for link in told["links"]]
    assert [link["algorithm"] for link in told["links"]] == ["dpo", "ipo"]
    assert told["steps"] == sum(steps)
    rows = [row.split(",") for row in (project / paths.plots_file("align@chain")).read_text().splitlines()]
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    assert columns["step"] == tuple(str(step + 1) for step in range(sum(steps)))
    assert columns["chain/link"] == ("1.0",) * steps[0] + ("2.0",) * steps[1]
    assert float(columns["reward/margin"][steps[0]]) == 0.0

    chain(project, links=["dpo", "ipo"])
    assert run(project, "align@chain") == 0
    line = (project / paths.plots_file("align@chain")).read_text().splitlines()[1 + steps[0]].split(",")
    assert float(line[rows[0].index("reward/margin")]) != 0.0


def test_n41_a_chain_broken_off_in_any_link_ends_with_the_same_bytes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL is bounded too, so breaks fall before, at and after measurements and ends of links."""
    chain(project, switch={"every": 3, "prompts": 8, "max_kl": 0.05})
    assert run(project, "align@chain") == 0
    unbroken = results(project, "align@chain")
    assert figures(project, "align@chain")["steps"] > 15
    for step in (6, 9, 15):
        shutil.rmtree(project / "artifacts/align/chain")
        faults._hits.clear()
        monkeypatch.setenv("RLHF_FAULT", f"train.step@{step}:raise")
        with pytest.raises(RuntimeError, match="fault ordered"):
            run(project, "align@chain")
        monkeypatch.delenv("RLHF_FAULT")
        assert run(project, "align@chain") == 0
        assert results(project, "align@chain") == unbroken, f"broken off at step {step}"


def test_a_link_ends_where_its_own_kl_passed_the_bound(project: Path, scripted: Any) -> None:
    """The bound counts from where the link began: 0.5 is over 0.4 for the first, 0.8 - 0.5 is not for the second."""
    scripted([(0.0, 0.0), (0.1, 0.0), (0.5, 0.0), (0.5, 0.0), (0.5, 0.0), (0.8, 0.0)])
    chain(project, links=["dpo", "ppo"], switch={"every": 2, "max_kl": 0.4})
    assert run(project, "align@chain") == 0
    first, second = figures(project, "align@chain")["links"]
    assert (first["steps"], first["ended_by"]) == (4, "max_kl")
    assert (second["steps"], second["ended_by"]) == (4, "last step")


def test_a_link_ends_where_the_score_rises_no_more(project: Path, scripted: Any) -> None:
    scripted([(0.0, 0.0), (0.0, 1.0), (0.0, 2.0), (0.0, 2.05)])
    chain(project, links=["dpo", "ipo"], switch={"every": 1, "min_score_gain": 0.1})
    assert run(project, "align@chain") == 0
    first, second = figures(project, "align@chain")["links"]
    assert (first["steps"], first["ended_by"]) == (3, "min_score_gain")
    assert (second["steps"], second["ended_by"]) == (1, "min_score_gain")


def test_without_bounds_only_the_ends_of_links_are_measured(project: Path, scripted: Any) -> None:
    asked = scripted([(0.0, 0.0)])
    chain(project)
    assert run(project, "align@chain") == 0
    assert len(asked) == 3


def test_reference_logprobs_of_an_earlier_run_are_found_by_a_run_in_a_worktree(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (project / paths.REFERENCE_CACHE).iterdir()
    before = tree_digest(project / "artifacts/align/dpo")
    asked: list[int] = []
    plain = reference.summed_logprobs
    monkeypatch.setattr(reference, "summed_logprobs", lambda *rest: asked.append(1) or plain(*rest))
    monkeypatch.setattr(paths, "home", lambda root: project)
    worktree = project.parent / "worktree"
    shutil.copytree(project, worktree, symlinks=True, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(worktree)
    assert run(worktree, "align@dpo") == 0
    assert not asked
    assert tree_digest(worktree / "artifacts/align/dpo") == before
    file.unlink()
    assert run(worktree, "align@dpo") == 0
    assert asked
    assert tree_digest(worktree / "artifacts/align/dpo") == before
    assert file.is_file()


@pytest.mark.parametrize("change_to", [{"beta": 0.2}, {"loss": "hinge"}, {"prompts_per_step": 3}])
def test_reference_logprobs_serve_every_loss_and_no_other_batches(
    project: Path, monkeypatch: pytest.MonkeyPatch, change_to: dict[str, Any]
) -> None:
    asked: list[int] = []
    plain = reference.summed_logprobs
    monkeypatch.setattr(reference, "summed_logprobs", lambda *rest: asked.append(1) or plain(*rest))
    with edited_yaml(project / "params.yaml") as params:
        params["align"]["dpo"] |= change_to
    assert run(project, "align@dpo") == 0
    assert bool(asked) == ("prompts_per_step" in change_to)


def combined(project: Path, **more: Any) -> None:
    change_sections(
        project, combine={"methods": ["weights", "probabilities"], "members": ["ppo", "dpo"], "pairs": 16} | more
    )


def chosen_likelihood(project: Path, policy: Any) -> float:
    """Log-likelihood a token of the held-out chosen responses that the stage read, read here anew."""
    params, definition = load_params(project / "params.yaml"), stage_definition(project, "combine@weights")
    stage = Stage(definition, params, project, project, None)
    pairs = combine._heldout_pairs(stage, load_tokenizer(project / "artifacts/sft/model"))
    rows = [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    return summed_logprobs(policy, *rows, pad_id=0, batch_size=1).sum() / sum(map(len, rows[1]))


def test_the_share_is_the_best_on_heldout_pairs_and_both_members_are_measured(project: Path) -> None:
    combined(project, shares=[0.2, 0.6])
    members = [load_policy(project / f"artifacts/align/{name}/model") for name in ("ppo", "dpo")]
    for method in ("weights", "probabilities"):
        assert run(project, f"combine@{method}") == 0
        told = figures(project, f"combine@{method}")
        assert [row["share"] for row in told["measured"]] == [0.0, 0.2, 0.6, 1.0]
        inner = told["measured"][1:-1]
        assert told["value"] == max(row["value"] for row in inner)
        assert told["second_share"] == max(inner, key=lambda row: row["value"])["share"]
        for member, row in zip(members, (told["measured"][0], told["measured"][-1]), strict=True):
            assert row["value"] == pytest.approx(chosen_likelihood(project, member), abs=1e-5)
        policy = load_any_policy(project / f"artifacts/align/{method}/model")
        assert told["value"] == pytest.approx(chosen_likelihood(project, policy), abs=1e-5)
        assert told["gain_over_better_member"] == pytest.approx(
            told["value"] - max(told["measured"][0]["value"], told["measured"][-1]["value"])
        )
        share = told["second_share"]
        if isinstance(policy, PolicyMixture):
            assert policy.shares == (1 - share, share)
        else:
            first, second, made = (dict(model.named_parameters()) for model in (*members, policy))
            assert all(torch.allclose(made[n], (1 - share) * first[n] + share * second[n], atol=1e-7) for n in made)


def test_combined_policies_are_compared_and_shown_like_the_others(project: Path) -> None:
    """By score too; the same run again writes the same bytes; at another temperature than 1 as well."""
    combined(project, choose_by="score", shares=[0.5], pairs=8)
    change_sections(project, evaluate={"temperatures": [0.7, 0.0]})
    for method in ("weights", "probabilities"):
        assert run(project, f"combine@{method}") == 0
        told = figures(project, f"combine@{method}")
        assert told["value"] == pytest.approx(told["score"] - 0.1 * told["kl_to_sft"])
        before = tree_digest(project / f"artifacts/align/{method}")
        assert run(project, f"combine@{method}") == 0
        assert tree_digest(project / f"artifacts/align/{method}") == before
    assert run(project, "evaluate") == 0
    told = figures(project, "evaluate")
    for name in ("weights", "probabilities"):
        assert told[name]["win"] + told[name]["tie"] + told[name]["loss"] == told["num_prompts"]
        assert told[name]["lengths"].keys() == {"T=0.7", "T=0"}
        assert told[name]["kl_to_sft"] is not None
    assert run(project, "report") == 0
    page = (project / "reports/html/report.html").read_text()
    assert "Averaged weights" in page
    assert "Mixed probabilities" in page


def test_dvc_and_the_stage_read_the_same_of_the_graph(project: Path) -> None:
    """Matrix items, and members that stand in a list of parameters."""
    combined(project, members=["chain", "dpo"])
    chain(project)
    with Repo.init(str(project), no_scm=True, force=True) as repo:
        stages = {stage.name: stage for stage in repo.index.stages if hasattr(stage, "cmd")}
    assert {"align@chain", "combine@weights", "combine@probabilities"} <= stages.keys()
    for name in ("align@chain", "combine@weights", "evaluate"):
        deps = {str(dep.def_path) for dep in stages[name].deps if "params.yaml" not in str(dep.def_path)}
        assert deps == set(stage_definition(project, name).deps)
    assert "artifacts/align/chain" in stage_definition(project, "combine@weights").deps
    assert stage_definition(project, "combine@weights").outs[0] == "artifacts/align/weights"


def test_without_methods_there_is_no_such_stage(project: Path) -> None:
    with Repo.init(str(project), no_scm=True, force=True) as repo:
        names = {stage.name for stage in repo.index.stages if hasattr(stage, "cmd")}
    assert not [name for name in names if name.startswith("combine")]
    assert "align@chain" not in names
