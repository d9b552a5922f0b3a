"""SFT model, reward model and policy of one lineage become candidates together or not at all."""

import pytest
from support.tracking import MODEL, STAGE, write_model

from tasks.tracking import Recorder, flush, registration
from tasks.tracking.registry import aliases_of

REWARD = "artifacts/reward/model"


def record_lineage(checkout, run, *, evaluated):
    """A run that made a reward model and a policy; only an evaluated one proposes them."""
    write_model(checkout, run)
    (checkout / REWARD / "weights").write_text(run)
    recorder = Recorder(checkout, run)
    recorder.start_stage("reward")
    made = {"reward": recorder.register("reward", checkout / REWARD, {})}
    recorder.start_stage(STAGE)
    made[STAGE] = recorder.register(STAGE, MODEL, {})
    if evaluated:
        recorder.set_candidates(made)
    return recorder


def candidates(store):
    return {name: aliases_of(store, name).get("candidate") for name in ("rlhf-reward", "rlhf-policy")}


def test_a_run_that_ends_before_its_evaluation_proposes_nothing(checkout, store):
    record_lineage(checkout, "one", evaluated=True).close()
    assert candidates(store) == {"rlhf-reward": 1, "rlhf-policy": 1}
    record_lineage(checkout, "two", evaluated=False).close("KILLED")
    assert aliases_of(store, "rlhf-reward") == {"candidate": 1}
    assert candidates(store) == {"rlhf-reward": 1, "rlhf-policy": 1}


def test_a_kill_between_two_aliases_is_made_good_by_the_next_sender(checkout, store, monkeypatch):
    record_lineage(checkout, "one", evaluated=True).close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    record_lineage(checkout, "two", evaluated=True).close()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    class Killed(BaseException):
        pass

    def die(name):
        if name == "candidates.between":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(registration, "faultpoint", die)
        with pytest.raises(Killed):
            flush(checkout)
    assert flush(checkout).problem is None
    assert candidates(store) == {"rlhf-reward": 2, "rlhf-policy": 2}


def test_where_one_of_them_is_gone_none_moves(checkout, store):
    record_lineage(checkout, "one", evaluated=True).close()
    recorder = record_lineage(checkout, "two", evaluated=False)
    made = {STAGE: recorder.register(STAGE, MODEL, {}), "reward": recorder.register("reward", checkout / REWARD, {})}
    assert str(recorder.version(made["reward"])) == "rlhf-reward/2"
    store.client.delete_model_version("rlhf-reward", "2")
    recorder.set_candidates(made)
    assert "candidates rlhf-policy, rlhf-reward: rlhf-reward has no version" in str(recorder.close())
    assert candidates(store) == {"rlhf-reward": 1, "rlhf-policy": 1}


def test_an_older_proposal_that_comes_late_moves_none_of_them(checkout, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    record_lineage(checkout, "old", evaluated=True).close()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    record_lineage(checkout, "new", evaluated=True).close()
    newer = candidates(store)
    flush(checkout)
    assert candidates(store) == newer == {"rlhf-reward": 1, "rlhf-policy": 1}
