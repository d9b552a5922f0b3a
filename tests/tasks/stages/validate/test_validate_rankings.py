"""The validate stage on rankings, and on labels that name a criterion."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.validate import DataProject

RANKING = {"prompt": "Ask?", "responses": ["x", "y", "z"], "ranking": [2, 1, 2]}
COMPARISON = {"prompt": "Ask?", "chosen": "Good.", "rejected": "Bad."}
VOTE = {"prompt": "Ask?", "response_a": "x", "response_b": "y", "annotator": "anna", "choice": "a"}

BAD = [
    ({"responses": ["x"], "ranking": [1]}, "responses.few", "responses: holds 1, a ranking needs at least two"),
    ({"ranking": [1, 2]}, "ranking.length", "ranking: holds 2 ranks for 3 responses"),
    ({"ranking": [0, 1, 2]}, "ranking.value", "ranking: holds 0, ranks begin with 1, the best"),
    ({"ranking": [1, True, 2]}, "ranking.type", "ranking: is array whose item 2 is boolean, must be an array of whole"),
    ({"ranking": [1, 2, 1.5]}, "ranking.type", "item 3 is number that is not whole"),
    ({"ranking": ["1", "2", "3"]}, "ranking.type", "item 1 is text"),
    ({"ranking": 1}, "ranking.type", "ranking: is number, must be an array of whole numbers"),
    ({"ranking": "[1, 2, 3]"}, "ranking.type", "ranking: is text, must be an array of whole numbers"),
    (
        {"responses": ["x", None, "z"]},
        "responses.type",
        "responses: is array whose item 2 is null, must be an array of",
    ),
    ({"responses": ["x", " \n", "z"]}, "responses.empty", "responses: item 2 is empty"),
    ({"responses": ["x", "y", "z" * 51]}, "responses.long", "responses: item 3 is longer than 50 characters"),
    ({"responses": ["x", "y", " Y"]}, "responses.same", "responses: two are equal but for case, white space"),
    ({"annotator": "an na"}, "annotator.value", "annotator: is 'an na'"),
    ({"criterion": "smell"}, "criterion.value", "must be one of overall, tone, or be named in validate.criteria"),
    ({"prompt": " "}, "prompt.empty", "prompt: is empty"),
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return DataProject(tmp_path)


def test_rankings_are_held_to_their_form(project):
    project.write(
        "rankings",
        [RANKING | {"rankings": [1]}, *(RANKING | {"task": str(i)} | change for i, (change, *_) in enumerate(BAD))],
    )
    metrics = project.run(max_response_chars=50, criteria=["overall", "tone"])["kinds"]["rankings"]
    found = {entry["line"]: entry for entry in project.quarantine()}
    for line, (change, code, reason) in enumerate(BAD, start=2):
        assert found[line]["codes"] == [code], change
        assert reason in found[line]["reason"], found[line]
    assert metrics["unknown_fields"] == ["rankings"]
    (kept,) = project.table("rankings")
    assert (kept["responses"], kept["ranking"], kept["annotator"]) == (["x", "y", "z"], [2, 1, 2], "file")
    assert (kept["criterion"], kept["split"]) == ("overall", "train")


def test_a_ranking_is_another_one_by_order_annotator_or_criterion(project):
    changes = [
        {"annotator": "anna"},
        {"annotator": "anna", "criterion": "overall"},  # written out or not: the same judgement
        {"annotator": "ben"},
        {"annotator": "anna", "criterion": "tone"},
        {"ranking": [1, 2, 3]},
        {"annotator": "anna", "responses": ["x", "y", "w"]},
    ]
    project.write("rankings", [RANKING | change for change in changes])
    figures = project.run(criteria=["overall", "tone"])["kinds"]["rankings"]
    assert [(entry["line"], entry["codes"]) for entry in project.quarantine()] == [(2, ["row.duplicate"])]
    assert len({row["id"] for row in project.table("rankings")}) == 5
    assert (figures["judged"], figures["judged_again"], figures["annotators"]) == (3, 2, 2)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_ranking(project, form):
    path = project.root / f"rankings.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([RANKING]), path)
    elif form == "csv":
        path.write_text('prompt,responses,ranking,criterion\nAsk?,"[""x"", ""y"", ""z""]","[2, 1, 2]",\n')
    else:
        path.write_text(json.dumps([RANKING] if form == "json" else RANKING) + "\n")
    project.data["rankings"] = path.name
    project.run()
    (kept,) = project.table("rankings")
    assert {name: kept[name] for name in RANKING} == RANKING
    assert kept["criterion"] == "overall"


def test_a_csv_cell_that_is_no_list_is_named(project):
    cells = ['Ask?,"[""x"", ""y""]",1 2', 'Ask?,x;y,"[1, 2]"', 'Ask?,"[""x"", ""y""]","[1, 2]"']
    (project.root / "rankings.csv").write_text("\n".join(["prompt,responses,ranking", *cells, ""]))
    project.data["rankings"] = "rankings.csv"
    project.run()
    assert [(entry["line"], entry["codes"]) for entry in project.quarantine()] == [
        (2, ["ranking.type"]),
        (3, ["responses.type"]),
    ]
    assert "ranking: is text that is no JSON array" in project.quarantine()[0]["reason"]


def test_rankings_alone_give_every_table_a_run_needs(project):
    project.data = {}
    rows = [RANKING | {"prompt": f"Ask {i}?"} for i in range(30)]
    equal = RANKING | {"prompt": "Equal?", "ranking": [1, 1, 1]}
    shared = RANKING | {"prompt": "Shared?", "ranking": [3, 1, 1]}
    toned = RANKING | {"prompt": "Toned?", "criterion": "tone"}
    project.write("rankings", [*rows, equal, shared, toned])
    project.run(heldout_share=0.3, criteria=["overall", "tone"])
    sides = {row["prompt"]: row["split"] for row in project.table("rankings")}
    train = {prompt for prompt, side in sides.items() if side == "train"}
    assert 5 < len(train) < len(sides)
    assert {row["prompt"] for row in project.table("prompts")} == train
    assert {row["prompt"] for row in project.table("heldout_prompts")} == sides.keys() - train
    best = {(row["prompt"], row["response"]) for row in project.table("demonstrations")}
    expected = {(prompt, "y") for prompt in train - {"Equal?", "Toned?"}}
    assert best == expected | ({("Shared?", "z")} if "Shared?" in train else set())
    assert {row["source"] for row in project.table("demonstrations")} == {"rankings"}


@pytest.mark.parametrize(("kind", "row"), [("comparisons", COMPARISON), ("votes", VOTE)])
def test_labels_may_name_a_known_criterion(project, kind, row):
    changes = [
        {},
        {"criterion": None},
        {"criterion": "tone"},
        {"criterion": "smell"},
        {"criterion": True},
        {"criteria": 1},
    ]
    project.write(kind, [row | {"annotator": "anna"} | change for change in changes])
    project.run(criteria=["overall", "tone"])
    assert [kept["criterion"] for kept in project.table(kind)] == ["overall", "tone"]
    found = {entry["line"]: (entry["file"], entry["codes"], entry["reason"]) for entry in project.quarantine()}
    assert {line: codes for line, (_, codes, _) in found.items()} == {
        2: ["row.duplicate"],
        4: ["criterion.value"],
        5: ["criterion.type"],
        6: ["row.form"],
    }
    assert found[4][0] == f"{kind}.jsonl"
    assert found[4][2] == "criterion: is 'smell', must be one of overall, tone, or be named in validate.criteria"


def test_a_comparison_on_a_criterion_is_no_demonstration(project):
    del project.data["demonstrations"]
    project.write(
        "comparisons", [COMPARISON, COMPARISON | {"chosen": "Bad.", "rejected": "Good.", "criterion": "tone"}]
    )
    project.run(criteria=["overall", "tone"])
    assert [row["response"] for row in project.table("demonstrations")] == ["Good."]
