"""`spool_before_types.jsonl` was written by the code in which events were dicts: every kind, while the store was away.

Its file names and hashes are those of the checkout that the tests of the record use.
"""

import json
import math
from pathlib import Path
from typing import get_args

import pytest
from support.tracking import write_responses

from tasks.tracking import Recorder, flush, list_versions, pending
from tasks.tracking.events import Event, as_line, read_event
from tasks.tracking.names import RUN_KEY
from tasks.tracking.registry import aliases_of
from tasks.tracking.spool import Spool

LINES = Path(__file__).with_name("spool_before_types.jsonl").read_text().splitlines()
EVENTS = get_args(get_args(Event)[0])


def lay_out(checkout, lines=LINES):
    """Put the spool and the files that it keeps where the old code left them."""
    spool = Spool(checkout, "old")
    write_responses(checkout, [0.5, 1.0])
    files = {
        "4c9ef12bff56/params.yaml": checkout / "params.yaml",
        "6a9bb93a50bc/model/weights": checkout / "artifacts/reward/model/weights",
        "0b2bd1714d01/model/weights": checkout / "artifacts/align/ppo/model/weights",
        "0d5ce01324e2/responses.parquet": checkout / "artifacts/evaluate/responses.parquet",
    }
    for kept, source in files.items():
        (spool.files / kept).parent.mkdir(parents=True)
        (spool.files / kept).write_bytes(source.read_bytes())
    spool.path.write_text("".join(f"{line}\n" for line in lines))
    return spool


def test_every_kind_is_there_and_is_written_as_it_was():
    assert {json.loads(line)["kind"] for line in LINES} == {kind.model_fields["kind"].default for kind in EVENTS}
    for line in LINES:
        as_then = json.dumps(json.loads(line, parse_int=float), sort_keys=True)
        assert json.dumps(json.loads(as_line(read_event(line)), parse_int=float), sort_keys=True) == as_then


def test_a_spool_from_before_is_sent_whole(checkout, store):
    spool = lay_out(checkout)
    assert pending(checkout) == len(LINES)
    assert (flush(checkout).sent, pending(checkout)) == (len(LINES), 0)
    assert not list(spool.files.rglob("*.*"))
    runs = {run.data.tags[RUN_KEY]: run for run in store.client.search_runs([store.experiment_id])}
    assert {key: run.info.status for key, run in runs.items()} == {
        "old": "FINISHED", "old/reward": "FINISHED", "old/align@ppo": "FINISHED", "old/evaluate": "FAILED",
    }  # fmt: skip
    assert runs["old"].data.params == {"sft.lr": "0.1", "sft.names": '["a"]'}
    assert runs["old"].data.metrics == {"ppo.win_rate": 0.789, "n": 3.0}
    assert [one.dataset.digest for one in runs["old"].inputs.dataset_inputs] == ["d" * 36]
    assert runs["old/evaluate"].data.tags["failure"] == "evaluate: no prompts"
    reward = runs["old/reward"].info.run_id
    curve = [(point.step, point.value) for point in store.client.get_metric_history(reward, "loss/train")]
    assert sorted(curve)[:3] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert math.isnan(sorted(curve)[3][1])
    assert [one.path for one in store.client.list_artifacts(reward, "settings")] == ["settings/params.yaml"]
    policy, reward_model = sorted(list_versions(checkout), key=lambda version: version.name)
    assert policy.metrics == {
        "train_score": 1.5, "steps": 7.0, "win_rate": 0.789, "win_rate_low": 0.755, "win_rate_high": 0.819,
        "kl_to_sft": 2.27, "gold_gain": None,
    }  # fmt: skip
    assert reward_model.metrics == {"pairwise_accuracy": 0.88, "spearman": None, "steps": 3.0, "ece": 0.02}
    assert aliases_of(store, "rlhf-policy") == aliases_of(store, "rlhf-reward") == {"candidate": 1}
    said = store.client.get_model_version("rlhf-policy", "1").description
    assert "by gold (simulated) on 500 held-out prompts at temperature 1, KL to SFT 2.27" in said
    assert len(store.client.list_artifacts(policy.run_id, f"evaluation/{policy.outputs_hash[:16]}")) == 1


def test_a_run_begun_before_goes_on_and_records_no_figure_twice(checkout, store):
    lay_out(checkout)
    with Recorder(checkout, "old") as recorder:
        assert recorder.next_step("reward", "loss/train") == 5
        recorder.metrics("reward", [{"step": step, "time": 1.8e9, "metrics": {"loss/train": 9.0}} for step in (3, 5)])
    (run,) = store.client.search_runs([store.experiment_id], f"tags.`{RUN_KEY}` = 'old/reward'")
    history = store.client.get_metric_history(run.info.run_id, "loss/train")
    assert [point.value for point in history if point.step in (3, 5)] == [1 / 3, 9.0]


def test_what_was_refused_before_is_offered_again(checkout, store):
    spool = lay_out(checkout, LINES[:4])
    (asked,) = [line for line in LINES if '"kept":"6a9bb93a50bc/model"' in line]
    refused = {"reason": "registration of rlhf-reward: too old", "event": json.loads(asked)}
    spool.refused.write_text(json.dumps(refused, sort_keys=True) + "\n")
    assert pending(checkout) == 5
    assert flush(checkout).refused == ()
    assert [str(version) for version in list_versions(checkout)] == ["rlhf-reward/1"]
    assert not spool.refused.exists()


def test_an_evaluation_without_a_verdict_had_nulls_in_its_place():
    row = json.loads(next(line for line in LINES if '"kind":"attach"' in line and '"judge"' in line))
    nulls = row | {"verdict": dict.fromkeys(row["verdict"])}
    assert read_event(json.dumps(nulls)).verdict is None
    assert read_event(json.dumps(row)).verdict.num_prompts == 500


@pytest.mark.parametrize(
    "line", ['{"kind":"thought","run":"old"}', '{"kind":"end","run":"old","status":"ASLEEP","time_ms":1}', "end"]
)
def test_what_a_later_version_wrote_waits_for_it_and_is_one_line(checkout, store, line):
    spool = lay_out(checkout, [*LINES[:2], line])
    for _ in range(2):
        delivery = flush(checkout)
        assert (delivery.pending, delivery.refused) == (1, ())
        assert "is no event that this version knows. Fix: " in str(delivery)
        assert "\n" not in str(delivery)
    spool.refused.write_text(f"{line}\n")
    spool.path.write_text("")
    assert (pending(checkout), flush(checkout).pending) == (1, 1)
    assert spool.refused.read_text() == f"{line}\n"


def test_a_recorder_goes_on_beside_what_a_later_version_wrote(checkout, store):
    lay_out(checkout, [LINES[0], '{"kind":"thought"}'])
    with Recorder(checkout, "old") as recorder:
        recorder.start_stage("reward")
    assert recorder.delivery.pending == pending(checkout) > 2
    assert "is no event that this version knows" in str(recorder.delivery)
