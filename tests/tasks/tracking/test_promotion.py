import pytest
from support.tracking import gated, git, record_policy
from support.warm_processes import forking

from rlhf_core.errors import ConfigError, EnvironmentProblem, GateRefused
from tasks.tracking import compare_versions, open_store, promote, promotion, read_audit, resolve_version, rollback
from tasks.tracking.registry import aliases_of

PARAMS = gated(min_pairwise_accuracy=0.8, min_spearman=0.7, max_kl_to_sft=6.0)
GOOD, BETTER = [0.0] * 40, [1.0] * 40


def aliases(store):
    return aliases_of(store, "rlhf-policy")


@pytest.fixture
def two(checkout):
    """`rlhf-policy/1` and the better `rlhf-policy/2`, which is the candidate."""
    record_policy(checkout, "one", "first", scores=GOOD)
    record_policy(checkout, "two", "second", scores=BETTER)
    return checkout


def test_promotion_moves_champion_and_previous_and_rollback_undoes_it(two, store):
    first = promote(two, "rlhf-policy/1", params=PARAMS)
    assert (first.champion, first.champion_before) == (1, None)
    assert aliases(store) == {"candidate": 2, "champion": 1}
    second = promote(two, "rlhf-policy@candidate", params=PARAMS, reason="better")
    assert [gate.name for gate in second.gates if gate.name == "min_win_rate_low_champion"]
    assert aliases(store) == {"candidate": 2, "champion": 2, "previous": 1}
    assert rollback(two, "rlhf-policy").champion == 1
    assert aliases(store) == {"candidate": 2, "champion": 1}
    assert rollback(two, "rlhf-policy").champion is None
    assert aliases(store) == {"candidate": 2}
    with pytest.raises(GateRefused, match="no promotion to undo"):
        rollback(two, "rlhf-policy")
    done = [(row.action, row.version, row.champion_before) for row in read_audit(two) if row.outcome == "done"]
    assert done == [("promote", 1, None), ("promote", 2, 1), ("rollback", 1, 2), ("rollback", None, 1)]


def test_a_refusal_names_the_gate_moves_nothing_and_is_on_record(two, store):
    promote(two, "rlhf-policy/2", params=PARAMS)
    with pytest.raises(GateRefused, match=r"min_win_rate_low_champion.* is 0.*>= 0.5") as refused:
        promote(two, "rlhf-policy/1", params=PARAMS)
    assert refused.value.exit_code == 3
    assert aliases(store)["champion"] == 2
    row = read_audit(two)[-1]
    assert (row.action, row.version, row.champion_before) == ("refuse", 1, 2)
    assert [gate["name"] for gate in row.gates if not gate["passed"]] == ["min_win_rate_low_champion"]


def test_what_is_champion_already_is_not_promoted_again(two, store):
    promote(two, "rlhf-policy/2", params=PARAMS)
    with pytest.raises(GateRefused, match="champion already"):
        promote(two, "rlhf-policy@candidate", params=PARAMS)
    assert aliases(store) == {"candidate": 2, "champion": 2}


def test_undefined_figures_and_uncommitted_code_bar_promotion(checkout):
    record_policy(checkout, "one", "first", scores=GOOD, win_rate_low=None)
    with pytest.raises(GateRefused, match="win rate against SFT is undefined"):
        promote(checkout, "rlhf-policy@candidate", params=PARAMS)
    (checkout / "code.py").write_text("print('changed')\n")
    record_policy(checkout, "two", "second", scores=GOOD)
    with pytest.raises(GateRefused, match=r"lineage.*code\.py"):
        promote(checkout, "rlhf-policy@candidate", params=PARAMS)


def test_a_champion_that_moved_while_the_gates_were_held_is_not_overwritten(two, store, monkeypatch):
    record_policy(two, "three", "third", scores=[2.0] * 40)
    hold = promotion.stand

    def hold_while_another_wins(*arguments):
        gates = hold(*arguments)
        monkeypatch.setattr(promotion, "stand", hold)
        promote(two, "rlhf-policy/2", params=PARAMS)
        return gates

    monkeypatch.setattr(promotion, "stand", hold_while_another_wins)
    with pytest.raises(GateRefused, match="champion moved from none to rlhf-policy/2"):
        promote(two, "rlhf-policy/3", params=PARAMS)
    assert aliases(store)["champion"] == 2


@pytest.mark.parametrize(
    ("point", "champion", "outcome"),
    [("promotion.noted", 1, "abandoned"), ("promotion.champion_moved", 2, "done")],
)
def test_a_killed_promotion_is_closed_by_the_next_one(two, store, monkeypatch, point, champion, outcome):
    promote(two, "rlhf-policy/1", params=PARAMS)
    with monkeypatch.context() as patch:
        patch.setenv("RLHF_FAULT", f"{point}:raise")
        with pytest.raises(RuntimeError, match="fault"):
            promote(two, "rlhf-policy/2", params=PARAMS)
    assert read_audit(two)[-1].outcome == "intended"
    assert aliases(store)["champion"] == champion
    if champion == 1:
        promote(two, "rlhf-policy/2", params=PARAMS)
    else:
        with pytest.raises(GateRefused, match="champion already"):
            promote(two, "rlhf-policy/2", params=PARAMS)
    assert aliases(store) == {"candidate": 2, "champion": 2, "previous": 1}
    assert [row.outcome for row in read_audit(two) if row.attempt == 3] == ["intended", outcome]
    assert rollback(two, "rlhf-policy").champion == 1


def test_a_trail_that_was_edited_is_noticed(two):
    promote(two, "rlhf-policy/1", params=PARAMS)
    promote(two, "rlhf-policy/2", params=PARAMS)
    trail = two / ".rlhf/audit.jsonl"
    trail.write_text(trail.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(EnvironmentProblem, match=r"audit\.jsonl:2: the row before it was changed"):
        read_audit(two)


def test_unknown_versions_are_refused_with_what_there_is(two):
    with pytest.raises(ConfigError, match="aliases there are: rlhf-policy@candidate"):
        resolve_version(two, "rlhf-policy@champion")
    with pytest.raises(ConfigError, match="no such version"):
        resolve_version(two, "rlhf-policy/9")
    for reference in ("rlhf-policy", "policy@candidate", "rlhf-policy@", "rlhf-policy/x"):
        with pytest.raises(ConfigError, match="no model version"):
            resolve_version(two, reference)


def test_comparison_shows_what_differs_and_the_ab_on_the_same_prompts(checkout):
    record_policy(checkout, "one", "first", scores=[0.0, 1.0, 2.0, 3.0], win_rate=0.6, win_rate_high=0.8)
    (checkout / "params.yaml").write_text("seed: 2\ncompute:\n  threads: 2\n")
    git(checkout, "commit", "--quiet", "--all", "--message", "another seed")
    record_policy(checkout, "two", "second", scores=[1.0, 1.0, 1.0])
    found = compare_versions(checkout, "rlhf-policy/2", "rlhf-policy/1", judge="gold", confidence=0.95)
    assert found.parameters == {"seed": (2, 1)}
    assert found.outputs == {"align@ppo": 1}
    assert set(found.lineage) == {"git_commit", "params_hash"}
    assert found.metrics["win_rate"] == {"a": None, "b": 0.6, "a_interval": None, "b_interval": (0.7, 0.8)}
    (entry,) = found.ab
    assert (entry["temperature"], entry["wins"], entry["ties"], entry["losses"], entry["num_prompts"]) == (
        1.0,
        1,
        1,
        1,
        3,
    )
    assert found.note == ""
    missing = compare_versions(checkout, "rlhf-policy/2", "rlhf-policy/1", judge="people", confidence=0.95)
    assert missing.ab == ()
    assert "not judged by 'people'" in missing.note


def test_a_lock_that_grew_during_a_run_is_no_difference_and_uncommitted_code_is(checkout):
    record_policy(checkout, "one", "first", scores=[0.0])
    lock = checkout / "dvc.lock"
    lock.write_text(lock.read_text() + "# one stage more\n")
    record_policy(checkout, "two", "second", scores=[1.0])
    (checkout / "code.py").write_text("print('other')\n")
    record_policy(checkout, "three", "third", scores=[2.0])

    def lineage(a, b):
        return compare_versions(checkout, f"rlhf-policy/{a}", f"rlhf-policy/{b}", judge="gold", confidence=0.95).lineage

    assert lineage(1, 2) == {}
    assert lineage(2, 3).keys() == {"git_dirty"}
    assert lineage(2, 3)["git_dirty"][0] == "clean"


def _promote_when_all_are_ready(root, barrier, answers):
    barrier.wait()
    try:
        promote(root, "rlhf-policy@candidate", params=PARAMS)
        answers.put("won")
    except GateRefused as refused:
        answers.put(str(refused))


@pytest.mark.integration
def test_of_eight_at_once_one_wins(two, store):
    promote(two, "rlhf-policy/1", params=PARAMS)
    barrier, answers = forking().Barrier(8), forking().Queue()
    racers = [forking().Process(target=_promote_when_all_are_ready, args=(two, barrier, answers)) for _ in range(8)]
    for racer in racers:
        racer.start()
    heard = [answers.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert heard.count("won") == 1
    assert all("champion already" in answer for answer in heard if answer != "won")
    assert aliases(store) == {"candidate": 2, "champion": 2, "previous": 1}
    rows = read_audit(two)
    assert [row.outcome for row in rows if row.action == "promote" and row.version == 2] == ["intended", "done"]
    assert len([row for row in rows if row.action == "refuse"]) == 7


def _open_when_all_are_ready(root, barrier, answers):
    barrier.wait()
    answers.put(open_store(root).experiment_id)


@pytest.mark.integration
def test_eight_processes_make_a_fresh_store_together(tmp_path):
    barrier, answers = forking().Barrier(8), forking().Queue()
    openers = [forking().Process(target=_open_when_all_are_ready, args=(tmp_path, barrier, answers)) for _ in range(8)]
    for opener in openers:
        opener.start()
    heard = {answers.get(timeout=180) for _ in openers}
    for opener in openers:
        opener.join()
    assert heard == {"1"}
