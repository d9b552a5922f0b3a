"""The label stage on small tables: every source ends in the same two tables, and metrics that are true of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlhf_core.config import Params
from rlhf_core.config.data import SOURCE_ROWS, SourceRow
from rlhf_core.data.reading.rankings import rankings_of
from rlhf_core.demo.scene import read_scene
from rlhf_core.errors import DataError
from rlhf_core.feedback.ballots import Ballot, Majority, Pair, Vote
from rlhf_core.text.identity import prompt_group
from tasks import paths
from tasks.frame.definition import StageDefinition
from tasks.frame.stage import Progress, Stage
from tasks.stages.label import run as label
from tasks.stages.label.sources import SOURCES, Figures, LabelSource
from tasks.tables import SCHEMAS, write_table

PROMPT = "Notes: The lamp: aisle F, price 35, stock 6.\nCustomer: How much is the lamp?\nAssistant:"
OTHER = "Notes: The rake: aisle A, price 20, stock 0.\nCustomer: Which aisle is the rake in?\nAssistant:"
RIGHT, WRONG, RUDE = "The lamp sells for 35 dollars.", "The lamp sells for 40 dollars.", "What a silly question."


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    groups = [{"group": prompt_group(OTHER)}]
    write_table(paths.VALIDATE / "heldout_groups.parquet", groups, SCHEMAS["heldout_groups"])
    write_table(paths.VALIDATE / "votes.parquet", [], SCHEMAS["votes"])
    write_table(paths.VALIDATE / "comparisons.parquet", [], SCHEMAS["comparisons"])
    write_table(paths.VALIDATE / "rankings.parquet", [], SCHEMAS["rankings"])
    write_table(paths.VALIDATE / "ratings.parquet", [], SCHEMAS["ratings"])
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
        "annotator": annotator, "choice": choice, "strength": strength, "seconds": None, "criterion": "overall",
        "task": "price",
    }  # fmt: skip
    return row | changes


def write_votes(*rows: dict) -> None:
    write_table(paths.VALIDATE / "votes.parquet", rows, SCHEMAS["votes"])


def comparison(
    chosen: str, rejected: str, split: str = "train", criterion: str = "overall", annotator: str = "file"
) -> dict:
    return {
        "id": "c", "prompt_id": "id-lamp", "prompt": PROMPT, "chosen": chosen, "rejected": rejected,
        "annotator": annotator, "strength": 1, "criterion": criterion, "task": "", "source": "x.jsonl", "split": split,
    }  # fmt: skip


def ranking(responses: list[str], ranks: list[int], annotator: str = "file", criterion: str = "overall") -> dict:
    return {
        "id": "r", "prompt_id": "id-lamp", "prompt": PROMPT, "responses": responses, "ranking": ranks,
        "annotator": annotator, "criterion": criterion, "task": "price", "split": "train",
    }  # fmt: skip


def write_rankings(*rows: dict) -> None:
    write_table(paths.VALIDATE / "rankings.parquet", rows, SCHEMAS["rankings"])


def labels(pairs: list[dict]) -> list[tuple]:
    return [(pair["response_a"], pair["response_b"], pair["criterion"], pair["label"]) for pair in pairs]


def write_comparisons(*rows: dict) -> None:
    write_table(paths.VALIDATE / "comparisons.parquet", rows, SCHEMAS["comparisons"])


def test_simulated_annotators_vote_on_every_pair(project: Path) -> None:
    write_responses(
        {PROMPT: [RIGHT, WRONG, RUDE, RIGHT], OTHER: ["The rake is in aisle A.", "The rake is in aisle B."]}
    )
    metrics, pairs, votes = run(project, source="simulated")
    assert (
        metrics["num_labelled_pairs"] == len(pairs) == 4
    )  # three of the lamp, whose fourth response repeats, one of the rake
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


def test_pairs_with_too_few_votes_are_left_out_and_counted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_votes(vote("ann", "a"), vote("bob", "a"), vote("ann", "b", pair_id="r", response_b=RUDE))
    metrics, pairs, votes = run(project, source="file", min_votes=2)
    assert [pair["pair_id"] for pair in pairs] == ["q"]
    assert (metrics["num_labelled_pairs"], len(votes)) == (1, 2)
    assert metrics["pairs_below_min_votes"] == 1
    assert "warning: 1 pairs have fewer than label.min_votes 2 votes; they are left out" in capsys.readouterr().out
    assert run(project, "again", source="file")[0]["pairs_below_min_votes"] == 0


def test_comparisons_serve_where_there_are_no_votes(project: Path) -> None:
    write_comparisons(comparison(RIGHT, WRONG), comparison(RIGHT, RUDE, split="heldout"))
    metrics, pairs, votes = run(project, source="file")
    assert [(pair["response_a"], pair["label"], pair["margin"], pair["split"]) for pair in pairs] == [
        (RIGHT, "a", 1.0, "train"),
        (RIGHT, "a", 1.0, "heldout"),
    ]
    assert {row["annotator"] for row in votes} == {"file"}
    assert metrics["krippendorff_alpha"] is None  # one vote a pair agrees with nothing


def test_comparisons_are_votes_of_their_annotators(project: Path) -> None:
    """Three for, one against: three quarters agree. Of ann's two the last counts, with strength 4."""
    write_comparisons(*([comparison(RIGHT, WRONG)] * 3), comparison(WRONG, RIGHT))
    _, pairs, _ = run(project, source="file")
    assert [(pair["label"], pair["num_votes"], pair["agreement"], pair["margin"]) for pair in pairs] == [
        ("a", 4, 0.75, 0.5)
    ]
    write_comparisons(
        comparison(WRONG, RIGHT, annotator="ann"),
        comparison(RIGHT, WRONG, annotator="bob"),
        comparison(RIGHT, WRONG, annotator="ann") | {"strength": 4},
    )
    _, pairs, _ = run(project, out="again", source="file")
    (pair,) = pairs
    assert (pair[f"response_{pair['label']}"], pair["num_votes"], pair["margin"]) == (RIGHT, 2, 2.5)


def test_pair_id_joins_votes_whose_texts_differ_in_white_space(project: Path) -> None:
    write_votes(vote("ann", "a"), vote("bob", "b", prompt=f"{PROMPT} ", response_a=WRONG, response_b=RIGHT))
    _, pairs, _ = run(project, source="file")
    assert [(pair["label"], pair["num_votes"]) for pair in pairs] == [("a", 2)]


def test_pair_id_joins_votes_whose_prompt_is_written_as_text_and_as_a_transcript(project: Path) -> None:
    transcript = f"\n\nHuman: {PROMPT}\n\nAssistant:"
    write_votes(vote("ann", "a"), vote("bob", "b", prompt=transcript, response_a=WRONG, response_b=RIGHT))
    _, pairs, _ = run(project, source="file")
    assert [(pair["label"], pair["num_votes"], pair["prompt"]) for pair in pairs] == [("a", 2, PROMPT)]


def rating(response: str, score: float, annotator: str = "file") -> dict:
    return {
        "prompt_id": "id-lamp", "prompt": PROMPT, "response": response, "annotator": annotator, "score": score,
        "split": "train",
    }  # fmt: skip


def test_grades_alone_are_votes_of_their_graders(project: Path) -> None:
    """Worked by hand. Ann (5 over 4) and bob (2 over 1) find RIGHT better than WRONG, cem finds them equal. Only dan
    graded RUDE, so that means decide: 3.67 of RIGHT against 3 of WRONG, RUDE and the unnamed 1 and 5."""
    grades = [
        rating(RIGHT, 5, "ann"), rating(WRONG, 4, "ann"), rating(RIGHT, 2, "bob"), rating(WRONG, 1, "bob"),
        rating(RIGHT, 4, "cem"), rating(WRONG, 4, "cem"), rating(RUDE, 3, "dan"), rating("?", 1), rating("?", 5),
    ]  # fmt: skip
    write_table(paths.VALIDATE / "ratings.parquet", grades, SCHEMAS["ratings"])
    metrics, pairs, votes = run(project, source="file")
    assert labels(pairs) == [
        (RIGHT, WRONG, "overall", "a"),
        (RIGHT, RUDE, "overall", "a"),
        (RIGHT, "?", "overall", "a"),
        (WRONG, RUDE, "overall", "tie"),
        (WRONG, "?", "overall", "tie"),
        (RUDE, "?", "overall", "tie"),
    ]
    assert [pair["num_votes"] for pair in pairs] == [3, 1, 1, 1, 1, 1]
    assert pairs[0]["agreement"] == pytest.approx(2 / 3)
    assert [row["annotator"] for row in votes] == ["ann", "bob", "cem"] + ["file"] * 5
    assert metrics["num_pairs_voted_again"] == 1


def test_grades_label_nothing_where_anything_else_does(project: Path) -> None:
    grades = [rating(RIGHT, 1), rating(RUDE, 5)]
    write_table(paths.VALIDATE / "ratings.parquet", grades, SCHEMAS["ratings"])
    write_comparisons(comparison(RIGHT, WRONG))
    assert labels(run(project, source="file")[1]) == [(RIGHT, WRONG, "overall", "a")]


def test_contradictory_comparisons_are_a_tie(project: Path) -> None:
    write_comparisons(comparison(RIGHT, WRONG), comparison(WRONG, RIGHT))
    _, pairs, _ = run(project, source="file")
    assert [(pair["label"], pair["num_votes"]) for pair in pairs] == [("tie", 2)]


def test_votes_take_precedence_over_comparisons(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those passed over are counted by kind; the comparison on a criterion without votes is not among them."""
    write_comparisons(comparison(RIGHT, WRONG), comparison(RIGHT, RUDE), comparison(RIGHT, RUDE, criterion="harmless"))
    write_rankings(ranking([RIGHT, WRONG], [1, 2]))
    write_votes(vote("ann", "b"))
    metrics, pairs, _ = run(project, source="file")
    assert labels(pairs) == [(RIGHT, WRONG, "overall", "b"), (RIGHT, RUDE, "harmless", "a")]
    assert metrics["passed_over"] == {"comparisons": 2, "rankings": 1}
    assert "warning: 2 rows of data.comparisons label nothing: there are votes" in capsys.readouterr().out


def test_what_the_simulation_does_not_read_is_counted(project: Path) -> None:
    write_responses({PROMPT: [RIGHT, WRONG]})
    write_comparisons(comparison(RIGHT, WRONG))
    write_votes(vote("ann", "b"), vote("bob", "b"))
    assert run(project, source="simulated")[0]["passed_over"] == {"votes": 2, "comparisons": 1}


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


def test_votes_on_different_criteria_are_different_questions(project: Path) -> None:
    """Worked by hand: all agree on `overall`, on `harmless` no better than chance; pooled, alpha would be 2/3."""
    write_votes(
        *(vote(name, "a", pair_id="q") for name in ("ann", "bob")),
        *(vote(name, "b", pair_id="r", response_b=RUDE) for name in ("ann", "bob")),
        *(vote(name, "tie", pair_id="q", criterion="harmless") for name in ("ann", "bob")),
        vote("ann", "tie", pair_id="r", response_b=RUDE, criterion="harmless"),
        vote("bob", "a", 4, pair_id="r", response_b=RUDE, criterion="harmless"),
    )
    metrics, pairs, votes = run(project, source="file")
    found = [(row["pair_id"], row["criterion"], row["label"], row["num_votes"], row["agreement"]) for row in pairs]
    assert found == [
        ("q", "overall", "a", 2, 1.0),
        ("r", "overall", "b", 2, 1.0),
        ("q", "harmless", "tie", 2, 1.0),
        ("r", "harmless", "a", 2, 0.5),
    ]
    assert pairs[3]["margin"] == 2.0, "four steps by bob, none by ann"
    assert [row["criterion"] for row in votes] == ["overall"] * 4 + ["harmless"] * 4
    harmless = metrics["criteria"]["harmless"]
    assert (metrics["krippendorff_alpha"], metrics["fleiss_kappa"]) == (1.0, 1.0)
    assert harmless["krippendorff_alpha"] == pytest.approx(0.0)  # 1 - (4 - 2) / (4 - (3 * 2 + 1 * 0) / 3)
    assert harmless["fleiss_kappa"] == pytest.approx(-1 / 3)  # (1/2 - (9/16 + 1/16)) / (1 - 10/16)
    assert (metrics["num_labelled_pairs"], metrics["num_votes"], metrics["tie_share"]) == (2, 4, 0.0)
    assert (harmless["num_labelled_pairs"], harmless["num_votes"], harmless["tie_share"]) == (2, 4, 0.5)
    table = json.loads((project / "out/annotators.json").read_text())["annotators"]
    assert (table["ann"]["num_votes"], table["ann"]["agreement"]) == (4, 0.75)


def test_without_other_criteria_nothing_is_said_of_them(project: Path) -> None:
    write_votes(vote("ann", "a"))
    assert "criteria" not in run(project, source="file")[0]


def test_a_ranking_gives_all_its_pairs_and_belongs_together(project: Path) -> None:
    write_rankings(ranking([RIGHT, WRONG, RUDE, "?"], [1, 3, 3, 2]))
    metrics, pairs, votes = run(project, source="file")
    assert labels(pairs) == [
        (RIGHT, WRONG, "overall", "a"),
        (RIGHT, RUDE, "overall", "a"),
        (RIGHT, "?", "overall", "a"),
        (WRONG, RUDE, "overall", "tie"),
        (WRONG, "?", "overall", "b"),
        (RUDE, "?", "overall", "b"),
    ]
    assert [pair["margin"] for pair in pairs] == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    (source,) = {row["source"] for row in pairs + votes}
    assert re.fullmatch("rankings:[0-9a-f]{16}", source)
    assert (metrics["num_labelled_pairs"], metrics["num_annotators"]) == (6, 1)


def test_several_rankings_of_a_prompt_are_votes_on_its_pairs(project: Path) -> None:
    """A second order of the same responses by the same annotator replaces the first, whole; one without a name counts
    beside all others."""
    texts = [RIGHT, WRONG, RUDE]
    write_rankings(
        ranking(texts, [3, 2, 1], "ann"),
        ranking(texts, [1, 2, 3], "ann"),
        ranking([WRONG, RIGHT, RUDE], [2, 1, 3], "bob"),
        ranking(texts, [2, 1, 3]),
        ranking(texts, [2, 1, 3]),
    )
    _, pairs, votes = run(project, source="file")
    found = [(pair["label"], pair["num_votes"], pair["agreement"], pair["margin"]) for pair in pairs]
    assert found == [("tie", 4, 0.0, 0.0), ("a", 4, 1.0, 1.0), ("a", 4, 1.0, 1.0)]
    assert sorted(row["annotator"] for row in votes) == ["ann"] * 3 + ["bob"] * 3 + ["file"] * 6


@pytest.mark.parametrize("annotator", ["ann", "file"])
def test_rankings_of_other_responses_by_one_annotator_stay_two(project: Path, annotator: str) -> None:
    """They share two responses and disagree on them: both votes count, and the pair belongs to both rankings."""
    write_rankings(
        ranking([RIGHT, WRONG, RUDE], [1, 2, 3], annotator),
        ranking([WRONG, RIGHT, "?"], [1, 2, 3], annotator),
    )
    _, pairs, votes = run(project, source="file")
    assert labels(pairs) == [
        (RIGHT, WRONG, "overall", "tie"),
        (RIGHT, RUDE, "overall", "a"),
        (WRONG, RUDE, "overall", "a"),
        (WRONG, "?", "overall", "a"),
        (RIGHT, "?", "overall", "a"),
    ]
    first, second = rankings_of(pairs[0]["source"])
    assert first != second
    assert [rankings_of(pair["source"]) for pair in pairs[1:]] == [(first,), (first,), (second,), (second,)]
    assert [row["choice"] for row in votes[:2]] == ["a", "b"]
    assert pairs[0]["num_votes"] == 2


def test_an_annotator_is_not_judged_by_their_own_other_ranking(project: Path) -> None:
    write_rankings(ranking([RIGHT, WRONG, RUDE], [1, 2, 3], "ann"), ranking([RIGHT, WRONG], [2, 1], "ann"))
    run(project, source="file")
    told = json.loads((project / "out/annotators.json").read_text())["annotators"]
    assert (told["ann"]["num_votes"], told["ann"]["agreement"]) == (4, None)
    write_rankings(
        ranking([RIGHT, WRONG, RUDE], [1, 2, 3], "ann"),
        ranking([RIGHT, WRONG], [2, 1], "ann"),
        ranking([RIGHT, WRONG], [1, 2], "bob"),
    )
    run(project, out="again", source="file")
    told = json.loads((project / "again/annotators.json").read_text())["annotators"]
    assert told["ann"]["agreement"] == 0.5


def test_comparisons_and_rankings_of_a_pair_add_up(project: Path) -> None:
    write_comparisons(comparison(WRONG, RIGHT), comparison(WRONG, RIGHT), comparison(WRONG, "?"))
    write_rankings(ranking([RIGHT, WRONG, RUDE], [1, 2, 3]))
    _, pairs, _ = run(project, source="file")
    assert labels(pairs)[0] == (WRONG, RIGHT, "overall", "a")
    assert [pair["num_votes"] for pair in pairs] == [3, 1, 1, 1]
    assert pairs[0]["margin"] == pytest.approx(1 / 3)
    ranked = pairs[0]["source"]
    assert [pair["source"] for pair in pairs] == [ranked, "file", ranked, ranked]


def test_votes_take_precedence_on_their_own_criterion_only(project: Path) -> None:
    write_votes(vote("ann", "b"))
    write_comparisons(comparison(RIGHT, WRONG), comparison(RIGHT, WRONG, criterion="harmless"))
    write_rankings(ranking([RIGHT, RUDE], [1, 2]), ranking([RIGHT, RUDE], [2, 1], criterion="tone"))
    _, pairs, _ = run(project, source="file")
    assert labels(pairs) == [
        (RIGHT, WRONG, "overall", "b"),
        (RIGHT, WRONG, "harmless", "a"),
        (RIGHT, RUDE, "tone", "b"),
    ]


def nameless(metrics: dict) -> list[str]:
    """Figures that are null without a reason, and reasons for figures that are there."""
    parts = [metrics, *metrics.get("criteria", {}).values()]
    return [name for part in parts for name in {n for n, v in part.items() if v is None} ^ set(part["undefined"])]


def test_what_is_null_says_why(project: Path) -> None:
    write_comparisons(comparison(RIGHT, WRONG))
    metrics, _, _ = run(project, source="file")
    assert nameless(metrics) == []
    once = "no pair has two votes"
    assert metrics["undefined"]["fleiss_kappa"] == metrics["undefined"]["krippendorff_alpha_high"] == once
    assert metrics["undefined"]["first_share"] == "no order was shown"
    assert metrics["undefined"]["mean_cohen_kappa"] == "no two annotators share a pair"
    write_comparisons()
    write_votes(*(vote(name, "tie", criterion="tone") for name in ("ann", "bob")))
    metrics, _, _ = run(project, "again", source="file")
    assert nameless(metrics) == []
    assert metrics["undefined"]["tie_share"] == "no pair is labelled"
    tone = metrics["criteria"]["tone"]["undefined"]
    assert (tone["mean_vote_margin"], tone["strength_alpha"]) == ("no pair is decided", "every answer is the same")
    assert tone["first_share"] == "no pair that was shown in an order is decided"
    assert tone["mean_cohen_kappa"] == "every two annotators gave one answer only"


def test_a_simulation_without_a_better_response_says_so(project: Path) -> None:
    write_responses({PROMPT: [RIGHT, f"{RIGHT} "]})
    metrics, _, _ = run(project, source="simulated")
    assert metrics["majority_agrees_with_gold"] is None
    assert nameless(metrics) == []


def test_a_source_that_the_registry_is_given_labels(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing else knows the name: what it votes is labelled, and rows that it does not read are passed over."""
    votes = tuple(Vote(annotator=name, choice=choice) for name, choice in (("x", "a"), ("y", "b"), ("z", "a")))
    responses = {"response_a": RIGHT, "response_b": WRONG}
    pair = Pair(pair_id="1", prompt_id="p", prompt=PROMPT, task="price", split="train", **responses)

    def figures(ballots: Sequence[Ballot], verdicts: Sequence[Majority]) -> Figures:
        assert ballots[0].votes == votes
        return {"labels": [one.label for one in verdicts], "certainty": None}, {"certainty": "it is not asked twice"}

    source = LabelSource(
        row=SourceRow(docs="a rule"),
        ballots=lambda stage: [Ballot(pair=pair, votes=votes)],
        reads=("votes",),
        figures=figures,
    )
    monkeypatch.setitem(SOURCES, "rule", source)
    write_comparisons(comparison(RIGHT, WRONG))
    write_votes(vote("ann", "b"))
    params = Params()
    params = params.model_copy(update={"label": params.label.model_copy(update={"source": "rule", "min_votes": 2})})
    definition = StageDefinition(name="label", deps=(), params=(), outs=())
    metrics = label.run(Stage(definition, params, project, project / "out", Progress(project / "progress.jsonl")))
    (labelled,) = pq.read_table(project / "out/pairs.parquet").to_pylist()
    assert (labelled["label"], labelled["num_votes"], labelled["source"]) == ("a", 3, "rule")
    assert metrics["passed_over"] == {"comparisons": 1}
    assert (metrics["labels"], metrics["certainty"]) == (["a"], None)
    assert metrics["undefined"]["certainty"] == "it is not asked twice"


def test_every_source_of_the_schema_can_be_asked():
    assert list(SOURCES) == list(SOURCE_ROWS)
    assert all(SOURCES[name].row is row for name, row in SOURCE_ROWS.items())
