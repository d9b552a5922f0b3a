"""Chains of algorithms as a stage: broken off anywhere, switched, with reference log-probabilities of earlier runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.project import change_sections, edited_yaml

from rlhf_core import faults
from rlhf_core.state.atomic import tree_digest
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import refused_steps
from rlhf_core.trainers.preference import reference
from tasks import paths
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.align import chain as align_chain
from tasks.stages.align import run as align
from tasks.stages.align.chain import add_refusals

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
    return run_stage(stage, align.run, load_params(project / "params.yaml"), project)


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
            return {"train_kl_to_sft": kl, "train_score": score}

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
    assert float(columns["implicit_reward/margin"][steps[0]]) == 0.0

    chain(project, links=["dpo", "ipo"])
    assert run(project, "align@chain") == 0
    line = (project / paths.plots_file("align@chain")).read_text().splitlines()[1 + steps[0]].split(",")
    assert float(line[rows[0].index("implicit_reward/margin")]) != 0.0


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
        faults.hits.clear()
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
    plain = reference.group_logprob_sums
    monkeypatch.setattr(reference, "group_logprob_sums", lambda *rest: asked.append(1) or plain(*rest))
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
    plain = reference.group_logprob_sums
    monkeypatch.setattr(reference, "group_logprob_sums", lambda *rest: asked.append(1) or plain(*rest))
    with edited_yaml(project / "params.yaml") as params:
        params["align"]["dpo"] |= change_to
    assert run(project, "align@dpo") == 0
    assert bool(asked) == ("prompts_per_step" in change_to)


def test_what_links_refuse_and_set_aside_is_counted_over_the_chain_and_named_by_its_steps() -> None:
    whole = TrainState(step=0)
    one = {"step": 2, "prompt": 7, "reason": "score"}
    for steps, refused in ((5, 1), (4, 2)):
        aside = {"responses": 3, "rollouts": 1, "named": [one]}
        link = TrainState(step=steps, extra={"refused/policy": refused, "refused/value": 1, "set_aside": aside})
        whole.step += steps
        add_refusals(whole, link)
    add_refusals(whole, TrainState(step=1))
    assert refused_steps(whole) == 5
    assert whole.extra["set_aside"]["responses"] == 6
    assert [named["step"] for named in whole.extra["set_aside"]["named"]] == [2, 7]
