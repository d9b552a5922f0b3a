"""Which stages run side by side, on the graph as it is and on graphs that a program made up."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from support.project import edited_yaml

from flows.run.plan import Plan
from flows.run.request import pipeline_stages
from flows.run.summary import RunSummary, StageSummary, covered
from tasks.frame.definition import stage_reads

ROOT = Path(__file__).parents[3]


def done(name: str) -> StageSummary:
    return StageSummary(name=name, status="done")


def rounds(plan: Plan) -> list[list[str]]:
    """What starts together when all that run end together."""
    found = []
    while started := list(plan.startable(())):
        found.append(started)
        for name in started:
            plan.note_end(done(name))
    return found


def test_the_demos_graph_runs_ppo_beside_dpo() -> None:
    reads = stage_reads(ROOT, pipeline_stages(ROOT))
    assert reads["align@ppo"] == {"validate", "sft", "preferences", "reward"}
    assert reads["evaluate"] == {"validate", "sft", "reward", "align@ppo", "align@dpo"}
    assert reads["report"] == set(reads) - {"report"}
    assert rounds(Plan(reads, lambda: 2)) == [
        ["validate"], ["sft"], ["generate"], ["label"], ["preferences"], ["reward"], ["align@ppo", "align@dpo"],
        ["evaluate"], ["regressions"], ["report"],
    ]  # fmt: skip
    assert all(len(together) == 1 for together in rounds(Plan(reads, lambda: 1)))


def test_chain_and_combined_policies_start_when_their_members_are_there(tmp_path: Path) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    with edited_yaml(tmp_path / "params.yaml") as params:
        params["align"]["algorithms"] = ["ppo", "dpo", "chain"]
        params["combine"]["methods"] = ["weights", "probabilities"]
    plan = Plan(stage_reads(tmp_path, pipeline_stages(tmp_path)), lambda: 3)
    for name in ("validate", "sft", "generate", "label", "preferences", "reward"):
        assert plan.startable(()) == [name]
        plan.note_end(done(name))
    assert plan.startable(()) == ["align@ppo", "align@dpo", "align@chain"]
    plan.note_end(done("align@ppo"))
    assert plan.startable(["align@dpo", "align@chain"]) == []
    plan.note_end(done("align@dpo"))
    assert plan.startable(["align@chain"]) == ["combine@weights", "combine@probabilities"]


def test_the_limit_holds_and_is_asked_while_nothing_runs() -> None:
    asked: list[int] = []

    def limit() -> int:
        asked.append(1)
        return 2

    plan = Plan(dict.fromkeys("abcd", ()), limit)
    assert plan.startable(()) == ["a", "b"]
    assert plan.startable(["a", "b"]) == []
    plan.note_end(done("a"))
    assert plan.startable(["b"]) == ["c"]
    assert len(asked) == 1


def test_nothing_starts_once_a_stage_has_failed() -> None:
    plan = Plan({"a": (), "b": (), "c": ()}, lambda: 2)
    assert plan.startable(()) == ["a", "b"]
    plan.note_end(StageSummary(name="a", status="failed"))
    plan.note_end(done("b"))
    assert plan.startable(()) == ()


def test_stages_with_nothing_to_do_wait_for_none_and_take_no_place() -> None:
    reads = {"a": (), "b": ("a",), "c": ("b",), "d": ("c",), "e": ("c",)}
    plan = Plan(reads, lambda: 1, idle=["a", "c"])
    assert plan.startable(()) == ["a", "c"]
    assert plan.startable(["a", "c"]) == []
    plan.note_end(StageSummary(name="a", status="unchanged"))
    assert plan.startable(["c"]) == ["b"], "the place is free, since c does nothing"
    plan.note_end(done("c"))
    assert plan.startable(["b"]) == [], "one at work, and one place"
    plan.note_end(done("b"))
    assert plan.startable(()) == ["d"]
    plan.note_end(StageSummary(name="d", status="failed"))
    assert plan.startable(()) == ()


@given(st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=8), st.integers(1, 4), st.randoms())
def test_on_any_graph_all_stages_start_once_after_what_they_read(before, at_most, chance) -> None:
    reads = {str(number): {str(one) for one in some if one < number} for number, some in enumerate(before)}
    plan, running, over, started = Plan(reads, lambda: at_most), [], [], []
    while True:
        new = list(plan.startable(running))
        assert all(reads[name] <= set(over) for name in new)
        running += new
        started += new
        assert len(running) <= at_most
        if not running:
            break
        ended = running.pop(chance.randrange(len(running)))
        over.append(ended)
        plan.note_end(done(ended))
    assert sorted(started) == sorted(reads)


def test_time_that_two_stages_share_counts_once() -> None:
    assert covered([(10.0, 5.0), (12.0, 1.0), (14.0, 4.0), (30.0, 2.0)]) == 10.0
    assert covered([]) == 0.0
    ran = [
        StageSummary(name="a", computed_from=100.0, compute_s=10.0),
        StageSummary(name="b", computed_from=105.0, compute_s=10.0),
    ]
    summary = RunSummary(run="r", run_key="k", started=99.0, stages=[*ran, StageSummary(name="c")])
    summary.close("done", 0, 120.0)
    assert (summary.compute_s, summary.busy_s, summary.overhead_s) == (20.0, 15.0, 6.0)
