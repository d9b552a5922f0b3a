"""The label stage on small tables: every source ends in the same two tables, and metrics that are true of them."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlhf_core.config import Params
from rlhf_core.data.demo.scene import read_scene
from rlhf_core.errors import DataError
from tasks import label, paths
from tasks.definition import StageDefinition
from tasks.stage import Progress, Stage
from tasks.tables import SCHEMAS, write_table

PROMPT = "Notes: The lamp: aisle F, price 35, stock 6.\nCustomer: How much is the lamp?\nAssistant:"
OTHER = "Notes: The rake: aisle A, price 20, stock 0.\nCustomer: Which aisle is the rake in?\nAssistant:"
RIGHT, WRONG, RUDE = "The lamp sells for 35 dollars.", "The lamp sells for 40 dollars.", "What a silly question."


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    heldout = [{"id": "h0", "prompt": OTHER, "task": "aisle"}]
    write_table(paths.VALIDATE / "heldout_prompts.parquet", heldout, SCHEMAS["heldout_prompts"])
    write_table(paths.VALIDATE / "votes.parquet", [], SCHEMAS["votes"])
    write_table(paths.VALIDATE / "comparisons.parquet", [], SCHEMAS["comparisons"])
    return tmp_path


def run(project: Path, out: str = "out", **settings: object) -> tuple[dict, list[dict], list[dict]]:
    """Run the stage; return metrics, pairs and votes."""
    params = Params.model_validate({"label": settings})
    definition = StageDefinition(name="label", deps=(), params=(), outs=())
    stage = Stage(definition, params, project, project / out, Progress(project / "progress.jsonl"))
    metrics = label.run(stage)
    json.dumps(metrics, allow_nan=False)
    tables = [pq.read_table(project / out / f"{name}.parquet") for name in ("pairs", "votes")]
    assert tables[0].schema == SCHEMAS["pairs"]
    assert tables[1].schema == SCHEMAS["label_votes"]
    return metrics, tables[0].to_pylist(), tables[1].to_pylist()


def write_responses(responses: dict[str, list[str]]) -> None:
    rows = [
        {
            "prompt_id": f"id-{read_scene(prompt).item}",
            "prompt": prompt,
            "task": read_scene(prompt).task,
            "split": "heldout" if prompt == OTHER else "train",
            "sample": sample,
            "model": "sft",
            "temperature": 1.0,
            "response": response,
            "response_ids": [1],
            "logprobs": [-1.0],
            "behaviour_logprobs": [-1.0],
            "finished": True,
            "score": None,
        }
        for prompt, texts in responses.items()
        for sample, response in enumerate(texts)
    ]
    write_table(paths.GENERATE / "responses.parquet", rows, SCHEMAS["responses"])


def vote(annotator: str, choice: str, strength: int = 1, **changes: object) -> dict:
    row = {
        "pair_id": "q", "prompt_id": "id-lamp", "prompt": PROMPT, "response_a": RIGHT, "response_b": WRONG,
        "annotator": annotator, "choice": choice, "strength": strength, "seconds": None, "task": "price",
    }  # fmt: skip
    return row | changes


def write_votes(*rows: dict) -> None:
    write_table(paths.VALIDATE / "votes.parquet", rows, SCHEMAS["votes"])


def comparison(chosen: str, rejected: str, split: str = "train") -> dict:
    return {
        "id": "c", "prompt_id": "id-lamp", "prompt": PROMPT, "chosen": chosen, "rejected": rejected,
        "task": "", "source": "x.jsonl", "split": split,
    }  # fmt: skip


def write_comparisons(*rows: dict) -> None:
    write_table(paths.VALIDATE / "comparisons.parquet", rows, SCHEMAS["comparisons"])


def test_simulated_annotators_vote_on_every_pair(project: Path) -> None:
    write_responses(
        {PROMPT: [RIGHT, WRONG, RUDE, RIGHT], OTHER: ["The rake is in aisle A.", "The rake is in aisle B."]}
    )
    metrics, pairs, votes = run(project, source="simulated")
    assert metrics["num_pairs"] == len(pairs) == 4  # three of the lamp, whose fourth response repeats, one of the rake
    assert metrics["num_votes"] == len(votes) == 20
    assert [pair["split"] for pair in pairs] == ["train"] * 3 + ["heldout"]
    assert {row["source"] for row in pairs + votes} == {"simulated"}
    assert len({row["annotator"] for row in votes}) == 5
    best = [
        pair[f"response_{pair['label']}"]
        for pair in pairs
        if {pair["response_a"], pair["response_b"]} == {RIGHT, WRONG}
    ]
    assert best == [RIGHT]
    assert 0 <= metrics["majority_agrees_with_gold"] <= 1
    report = json.loads((project / "out/annotators.json").read_text())
    assert report["source"] == "simulated"
    assert report["annotators"]["sim-alma"]["num_votes"] == 4


def test_the_same_responses_get_the_same_bytes(project: Path) -> None:
    write_responses({PROMPT: [RIGHT, WRONG, RUDE]})
    run(project, "one", source="simulated")
    run(project, "two", source="simulated")
    for name in ("votes.parquet", "pairs.parquet", "annotators.json"):
        assert (project / "one" / name).read_bytes() == (project / "two" / name).read_bytes()


def test_votes_of_a_file_make_labels(project: Path) -> None:
    write_votes(
        vote("ann", "a", 3), vote("bob", "a", 2), vote("cem", "b", 2),
        vote("ann", "tie", pair_id="r", prompt=OTHER, prompt_id="id-rake"),
    )  # fmt: skip
    metrics, pairs, votes = run(project, source="file")
    assert [(pair["pair_id"], pair["label"], pair["num_votes"], pair["split"]) for pair in pairs] == [
        ("q", "a", 3, "train"),
        ("r", "tie", 1, "heldout"),
    ]
    assert pairs[0]["agreement"] == pytest.approx(2 / 3)
    assert pairs[0]["margin"] == pytest.approx(1.0)
    assert len(votes) == 4
    assert metrics["tie_share"] == 0.5
    assert "majority_agrees_with_gold" not in metrics


def test_a_vote_on_the_swapped_pair_is_turned(project: Path) -> None:
    write_votes(vote("ann", "a", 2), vote("bob", "b", 3, response_a=WRONG, response_b=RIGHT))
    _, pairs, votes = run(project, source="file")
    assert (pairs[0]["label"], pairs[0]["margin"]) == ("a", 2.5)
    assert {(row["response_a"], row["choice"]) for row in votes} == {(RIGHT, "a")}


def test_who_votes_twice_counts_once_with_the_last_vote(project: Path) -> None:
    write_votes(vote("ann", "a"), vote("ann", "b"), vote("bob", "b"))
    _, pairs, votes = run(project, source="file")
    assert (pairs[0]["label"], pairs[0]["num_votes"], pairs[0]["agreement"]) == ("b", 2, 1.0)
    assert len(votes) == 2


def test_one_id_for_two_pairs_is_refused(project: Path) -> None:
    write_votes(vote("ann", "a"), vote("bob", "a", response_b=RUDE))
    with pytest.raises(DataError, match="'q' stands for two different pairs"):
        run(project, source="file")


def test_pairs_with_too_few_votes_are_left_out(project: Path) -> None:
    write_votes(vote("ann", "a"), vote("bob", "a"), vote("ann", "b", pair_id="r", response_b=RUDE))
    metrics, pairs, votes = run(project, source="file", min_votes=2)
    assert [pair["pair_id"] for pair in pairs] == ["q"]
    assert (metrics["num_pairs"], len(votes)) == (1, 2)


def test_comparisons_serve_where_there_are_no_votes(project: Path) -> None:
    write_comparisons(comparison(RIGHT, WRONG), comparison(RIGHT, RUDE, split="heldout"))
    metrics, pairs, votes = run(project, source="file")
    assert [(pair["response_a"], pair["label"], pair["margin"], pair["split"]) for pair in pairs] == [
        (RIGHT, "a", 1.0, "train"),
        (RIGHT, "a", 1.0, "heldout"),
    ]
    assert {row["annotator"] for row in votes} == {"file"}
    assert metrics["krippendorff_alpha"] is None  # one vote a pair agrees with nothing


def test_contradictory_comparisons_are_a_tie(project: Path) -> None:
    write_comparisons(comparison(RIGHT, WRONG), comparison(WRONG, RIGHT))
    _, pairs, _ = run(project, source="file")
    assert [(pair["label"], pair["num_votes"]) for pair in pairs] == [("tie", 2)]


def test_votes_take_precedence_over_comparisons(project: Path) -> None:
    write_comparisons(comparison(RIGHT, WRONG))
    write_votes(vote("ann", "b"))
    _, pairs, _ = run(project, source="file")
    assert [pair["label"] for pair in pairs] == ["b"]


def test_nothing_to_label_is_refused(project: Path) -> None:
    with pytest.raises(DataError, match="gave no pair with 1 or more votes"):
        run(project, source="file")


def test_simulated_annotators_refuse_foreign_prompts(project: Path) -> None:
    rows = {PROMPT: [RIGHT, WRONG]}
    write_responses(rows)
    table = pq.read_table(paths.GENERATE / "responses.parquet").to_pylist()
    write_table(
        paths.GENERATE / "responses.parquet",
        [row | {"prompt": "What is RLHF?"} for row in table],
        SCHEMAS["responses"],
    )
    with pytest.raises(DataError, match="not a prompt of the demo world"):
        run(project, source="simulated")
