"""The validate stage on small dirty files: what is set aside, why, where; what stops it; what it hands on."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.templates import TOOLS, WITH_TOOLS
from support.validate import DEMONSTRATIONS, HELDOUT, DataProject

from rlhf_core.data.cleaning.splits import is_heldout
from rlhf_core.errors import DataError
from rlhf_core.text.identity import prompt_group
from rlhf_core.text.transcripts import parse_messages

REAL = Path(__file__).parents[5] / "shared/data"
TABLES = (
    "demonstrations",
    "prompts",
    "heldout_prompts",
    "heldout_groups",
    "heldout_replies",
    "graded",
    "criteria",
    "ratings",
    "votes",
    "comparisons",
    "rankings",
)
COMPARISON = {"prompt": "Ask?", "chosen": "Good.", "rejected": "Bad."}
VOTE = {"prompt": "Ask?", "response_a": "x", "response_b": "y", "annotator": "anna", "choice": "a"}


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return DataProject(tmp_path)


def test_good_rows_reach_their_tables_and_every_table_is_there(project):
    metrics = project.run()
    assert metrics["rows_in"] == metrics["rows_kept"] == 9
    assert metrics["tables"] == {name: len(project.table(name)) for name in TABLES}
    assert [row["response"] for row in project.table("demonstrations")] == [row["response"] for row in DEMONSTRATIONS]
    assert [row["prompt"] for row in project.table("heldout_prompts")] == [row["prompt"] for row in HELDOUT]
    assert project.quarantine() == []


def test_comparisons_dirty_like_real_ones(project):
    shared = ("Hi", "Hello", "Tell me more")
    rows = [
        {"chosen": transcript(*shared, "Sure."), "rejected": transcript(*shared, "No.")},
        {"chosen": transcript(*shared, ""), "rejected": transcript(*shared, "No.")},
        {"chosen": transcript("Hi", "Hullo", "More", "a"), "rejected": transcript("Hi", "Hello", "More", "b")},
        COMPARISON | {"chosen": True},
        COMPARISON | {"id": "c5"},
        {"prompt": "Ask?", "chosen": "Same ", "rejected": "SAME"},
        COMPARISON | {"id": "c5"},
        '{"prompt": "Ask?", "chosen": "a", "chosen": "b", "rejected": "c"}',
        {"prompt": "Ask?", "choosen": "Good.", "rejected": "Bad."},
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"},
    ]
    project.write("comparisons", rows)
    metrics = project.run()["kinds"]["comparisons"]
    found = {entry["line"]: (entry["codes"], entry["reason"]) for entry in project.quarantine()}
    assert {line: codes for line, (codes, _) in found.items()} == {
        2: ["chosen.empty"],
        3: ["transcripts.part_early"],
        4: ["chosen.type"],
        6: ["responses.same"],
        7: ["row.duplicate"],
        8: ["row.unreadable"],
        9: ["chosen.type"],
    }
    assert found[4][1] == "chosen: is boolean, must be text"
    assert found[7][1] == "the same judgement stands at line 5"
    assert "nearest name is 'choosen'" in found[9][1]
    assert metrics["warnings"] == {"turns.alternate": 1}
    (warning,) = project.entries("warnings")
    assert (warning["file"], warning["line"], warning["code"]) == ("comparisons.jsonl", 10, "turns.alternate")
    assert (metrics["rows_in"], metrics["rows_kept"], metrics["rows_bad"], metrics["rows_duplicate"]) == (10, 3, 6, 1)
    assert metrics["reasons"]["chosen.type"] == 2
    raw = (project.root / "comparisons.jsonl").read_text().split("\n")
    for entry in project.quarantine():
        assert entry["file"] == "comparisons.jsonl"
        assert entry["sha256"] == hashlib.sha256(raw[entry["line"] - 1].encode()).hexdigest()


BAD_VOTES = [
    ({"choice": "c"}, "choice.value", "choice: is 'c', must be one of a, b, tie"),
    ({"strength": 0}, "strength.value", "strength: is '0', must be from 1 to 5"),
    ({"strength": 6}, "strength.value", "strength: is '6', must be from 1 to 5"),
    ({"strength": True}, "strength.type", "strength: is boolean, must be a whole number"),
    ({"strength": "3"}, "strength.type", "strength: is text, must be a whole number"),
    ({"seconds": -0.5}, "seconds.value", "seconds: is '-0.5', must not be negative"),
    ({"annotator": "an na"}, "annotator.value", "annotator: is 'an na', must be 1 to 64 letters"),
    ({"annotator": None}, "annotator.type", "annotator: is null, must be text"),
    ({"annotator": "<img src=x onerror=alert(1)>"}, "annotator.value", "annotator"),
    ({"response_b": " X "}, "responses.same", "response_a equals response_b"),
    ({"response_a": "\t"}, "response_a.empty", "response_a: is empty"),
    ({"prompt": "\n "}, "prompt.empty", "prompt: is empty"),
    ({"prompt": "p" * 101}, "prompt.long", "prompt: is longer than 100 characters"),
    ({"response_a": "r" * 51}, "response_a.long", "response_a: is longer than 50 characters"),
    ({"strenght": 3}, "row.form", "unknown field 'strenght'; the nearest known one is 'strength'"),
    ({"task": 3.5}, "task.type", "task: is number, must be text"),
]


def test_votes_hold_known_values_only(project):
    project.write(
        "votes", [VOTE] + [VOTE | {"annotator": f"a{i}"} | change for i, (change, _, _) in enumerate(BAD_VOTES)]
    )
    project.run(max_prompt_chars=100, max_response_chars=50)
    found = project.quarantine()
    assert [entry["line"] for entry in found] == list(range(2, len(BAD_VOTES) + 2))
    for entry, (change, code, reason) in zip(found, BAD_VOTES, strict=True):
        assert entry["codes"] == [code], change
        assert reason in entry["reason"]
    assert len(project.table("votes")) == 1


def test_votes_get_ids_that_gather_a_pair_in_either_order(project):
    swapped = VOTE | {"annotator": "ben", "response_a": "y", "response_b": "x"}
    project.write("votes", [VOTE, swapped, VOTE | {"annotator": "cleo", "response_b": "z"}])
    project.run()
    first, second, third = project.table("votes")
    assert first["pair_id"] == second["pair_id"] != third["pair_id"]
    assert (first["strength"], first["seconds"], first["task"]) == (1, None, "")


def test_the_last_vote_of_an_annotator_is_kept_and_the_one_before_named(project, capsys):
    """Opinions go a, b, a: the last says a, also where the row before it is not a good one."""
    rows = [VOTE, VOTE | {"choice": "b"}, VOTE | {"strength": 5}, VOTE | {"choice": "c"}]
    project.write("votes", [*rows, VOTE | {"annotator": "ben", "choice": "b"}])
    figures = project.run()["kinds"]["votes"]
    assert [(row["annotator"], row["choice"], row["strength"]) for row in project.table("votes")] == [
        ("anna", "a", 5),
        ("ben", "b", 1),
    ]
    assert [(entry["line"], entry["codes"]) for entry in project.quarantine()] == [
        (1, ["row.revised"]),
        (2, ["row.revised"]),
        (4, ["choice.value"]),
    ]
    assert "annotator 'anna' judges these responses again at line 3" in project.quarantine()[1]["reason"]
    counts = ("rows_revised", "rows_bad", "rows_duplicate", "judged", "judged_again", "annotators")
    assert [figures[name] for name in counts] == [2, 1, 0, 1, 1, 2]
    assert "warning: votes.jsonl: 2 judgements were revised by their annotator later" in capsys.readouterr().out


def test_grades_of_several_people_are_averaged_and_counted(project):
    """Worked by hand: 4, 1 and 1 are 2; kim's second thought replaces the first; nobody's grade is lost."""
    grade = {"prompt": "Ask?", "response": "x"}
    rows = [
        grade | {"score": 5, "annotator": "kim"},
        grade | {"score": 1, "annotator": "lee"},
        grade | {"score": 1, "annotator": "max"},
        grade | {"score": 4, "annotator": "kim"},
        grade | {"response": "y", "score": 1},
        grade | {"response": "y", "score": 2},
        grade | {"response": "y", "score": 1},
        grade | {"response": "z", "score": 2, "id": "g"},
        grade | {"response": "z", "score": 2, "id": "g"},
    ]
    project.write("graded", rows)
    figures = project.run()["kinds"]["graded"]
    assert [(row["response"], row["score"]) for row in project.table("graded")] == [
        ("x", 2.0),
        ("y", 4 / 3),
        ("z", 2.0),
    ]
    assert [(entry["line"], entry["codes"]) for entry in project.quarantine()] == [
        (1, ["row.revised"]),
        (9, ["row.duplicate"]),
    ]
    assert (figures["judged"], figures["judged_again"], figures["annotators"], figures["rows_bad"]) == (3, 4, 3, 0)


def test_rows_of_an_array_on_one_line_have_places_of_their_own(project):
    rows = [DEMONSTRATIONS[0], DEMONSTRATIONS[0], {"prompt": "p", "response": ""}, {"prompt": 1}, DEMONSTRATIONS[1]]
    (project.root / "d.json").write_text(json.dumps(rows))
    project.data["demonstrations"] = "d.json"
    project.run()
    assert [(entry["line"], entry["item"], entry["codes"]) for entry in project.quarantine()] == [
        (1, 2, ["row.duplicate"]),
        (1, 3, ["response.empty"]),
        (1, 4, ["prompt.type", "response.type"]),
    ]
    assert project.quarantine()[0]["reason"] == "the same item stands at item 1, line 1"
    with pytest.raises(DataError, match=r"^d\.json:1: item 3: response: is empty"):
        project.run(out="again", max_bad_share=0.0)


def test_rows_without_form_are_no_duplicates_and_lack_no_optional_field(project):
    project.write("comparisons", [COMPARISON, 7, 7, {"chosen": [], "rejected": []}, {"chosen": [], "rejected": []}])
    metrics = project.run()["kinds"]["comparisons"]
    assert [entry["codes"] for entry in project.quarantine()] == [["row.form"]] * 4
    assert (metrics["rows_bad"], metrics["rows_duplicate"], metrics["reasons"]) == (4, 0, {"row.form": 4})


def test_where_no_row_is_left_no_share_is_blamed(project):
    project.write("demonstrations", [{"prompt": "p", "response": ""}] * 2)
    with pytest.raises(
        DataError, match=r"2 of 2 rows of data.demonstrations are bad \(.*\), so that none is left. Fix"
    ):
        project.run(max_bad_share=1.0)


def test_an_id_says_one_thing_only(project):
    rows = [DEMONSTRATIONS[0] | {"id": "x"}, DEMONSTRATIONS[1] | {"id": "x"}, DEMONSTRATIONS[2] | {"id": 7}]
    project.write("demonstrations", rows)
    swapped = {"response_a": VOTE["response_b"], "response_b": VOTE["response_a"]}
    votes = [VOTE | {"pair_id": "v"}, VOTE | {"pair_id": "v", "annotator": "ben"} | swapped]
    project.write("votes", [*votes, VOTE | {"pair_id": "v", "response_b": "z"}])
    project.run()
    assert [row["id"] for row in project.table("demonstrations")] == ["x", "7"]
    assert [(entry["kind"], entry["line"], entry["codes"]) for entry in project.quarantine()] == [
        ("demonstrations", 2, ["id.taken"]),
        ("votes", 3, ["id.taken"]),
    ]


def test_a_good_row_takes_the_place_of_a_bad_one_of_the_same_item(project):
    project.write("votes", [VOTE | {"strength": 9}, VOTE | {"strength": 2}, VOTE | {"strength": 2}])
    metrics = project.run()["kinds"]["votes"]
    assert [row["strength"] for row in project.table("votes")] == [2]
    assert (metrics["rows_bad"], metrics["rows_duplicate"], metrics["rows_kept"]) == (1, 1, 1)
    assert project.quarantine()[1]["reason"] == "the same judgement stands at line 2"


def test_grades_by_criterion_go_to_a_table_of_their_own(project):
    grade = {"prompt": "Ask?", "response": "x", "score": 0.5}
    rows = [
        grade,
        grade | {"criterion": "tone"},
        grade | {"criterion": "smell"},
        grade | {"response": "y", "score": 1.5},
        grade | {"response": "z", "score": "0.5"},
        '{"prompt": "Ask?", "response": "w", "score": 1e999}',
    ]
    project.write("graded", rows)
    project.run(criteria=["overall", "tone"], score_range=[0.0, 1.0])
    assert [row["score"] for row in project.table("graded")] == [0.5]
    assert [(row["criterion"], row["annotator"]) for row in project.table("criteria")] == [("tone", "file")]
    assert [entry["codes"] for entry in project.quarantine()] == [
        ["criterion.value"],
        ["score.value"],
        ["score.type"],
        ["row.unreadable"],
    ]


def test_above_the_share_of_bad_rows_it_stops_and_leaves_the_quarantine_to_look_at(project):
    project.write("demonstrations", [*DEMONSTRATIONS, {"prompt": "p", "response": ""}])
    with pytest.raises(DataError, match=r"^demonstrations\.jsonl:7: response: is empty; 1 of 7 rows .*Fix: ") as raised:
        project.run(max_bad_share=0.1)
    assert raised.value.exit_code == 4
    assert len(project.quarantine(".rlhf/refused")) == 1
    project.run(out="again", max_bad_share=0.2)
    assert not (project.root / ".rlhf/refused").exists()


def test_duplicates_do_not_count_as_bad(project):
    project.write("demonstrations", [*DEMONSTRATIONS, *DEMONSTRATIONS])
    metrics = project.run(max_bad_share=0.0)
    assert (metrics["bad_share"], metrics["rows_duplicate"]) == (0.0, 6)


def test_training_prompts_that_are_held_out_are_listed_and_refused(project):
    leaked = [{"prompt": "  HELD-OUT  1? "}, {"prompt": "fine"}, {"prompt": "Held-out 2?"}]
    project.write("prompts", leaked)
    message = r"^prompts\.jsonl:1: prompt: 2 prompts .*line 1 = heldout_prompts\.jsonl:2, line 3 = heldout_prompts"
    with pytest.raises(DataError, match=message):
        project.run()
    project.write("prompts", [{"prompt": "fine"}])
    project.write("demonstrations", [*DEMONSTRATIONS, {"prompt": "Held-Out 1?", "response": "x"}])
    with pytest.raises(DataError, match=r"^demonstrations\.jsonl:7: prompt: 1 prompts are held-out ones too"):
        project.run(out="again")


def test_comparisons_on_held_out_prompts_are_split_not_refused(project):
    project.write("comparisons", [COMPARISON, COMPARISON | {"prompt": "held-out 1?"}])
    project.run()
    assert [row["split"] for row in project.table("comparisons")] == ["train", "heldout"]


def test_comparisons_alone_give_every_table_a_run_needs(project):
    project.data = {}
    rows = [COMPARISON | {"prompt": f"Ask {i}?", "task": "t"} for i in range(40)]
    project.write("comparisons", [*rows, COMPARISON | {"prompt": "ask  3?", "rejected": "Worse."}])
    project.run(heldout_share=0.3)
    heldout = {f"Ask {i}?" for i in range(40) if is_heldout(prompt_group(f"Ask {i}?"), 0.3)}
    assert 5 < len(heldout) < 20
    assert {row["prompt"] for row in project.table("heldout_prompts")} == heldout
    assert {row["prompt"] for row in project.table("prompts")} == {f"Ask {i}?" for i in range(40)} - heldout
    demonstrations = project.table("demonstrations")
    assert {prompt_group(row["prompt"]) for row in demonstrations}.isdisjoint(map(prompt_group, heldout))
    found = {(row["response"], row["source"], row["split"]) for row in demonstrations}
    assert found == {("Good.", "comparisons", "train")}
    assert {row["split"] for row in project.table("comparisons")} == {"train", "heldout"}


@pytest.mark.parametrize(
    ("data", "share", "message"),
    [
        ({}, 0.0, "names no file"),
        ({"prompts": [{"prompt": "x"}]}, 0.0, "no training demonstration"),
        ({"demonstrations": DEMONSTRATIONS}, 0.0, "no held-out prompt"),
        ({"demonstrations": [], "heldout_prompts": HELDOUT}, 0.0, "demonstrations.jsonl: data.demonstrations: no rows"),
        ({"demonstrations": ["{}"], "heldout_prompts": HELDOUT}, 0.0, "1 of 1 rows of data.demonstrations are bad"),
    ],
)
def test_nothing_to_work_on_is_said_at_once(project, data, share, message):
    project.data = {}
    for kind, rows in data.items():
        project.write(kind, rows)
    with pytest.raises(DataError, match=re.escape(message)):
        project.run(heldout_share=share)


def test_csv_and_gzipped_files_are_read_by_the_same_rules(project):
    (project.root / "votes.csv").write_text(
        "prompt,response_a,response_b,annotator,choice,strength,seconds\nAsk?,x,y,anna,a,2,\nAsk?,x,y,ben,b,2.5,1\n"
    )
    project.data["votes"] = "votes.csv"
    text = "".join(json.dumps(row) + "\n" for row in [*DEMONSTRATIONS, {"prompt": "", "response": "x"}])
    (project.root / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    project.data["demonstrations"] = "d.jsonl.gz"
    project.run()
    (vote,) = project.table("votes")
    assert (vote["strength"], vote["seconds"]) == (2, None)
    places = [(entry["file"], entry["line"], entry["codes"]) for entry in project.quarantine()]
    assert places == [("d.jsonl.gz", 7, ["prompt.empty"]), ("votes.csv", 3, ["strength.type"])]


def test_the_same_data_gives_the_same_bytes_and_pages_that_run_and_load_nothing(project):
    payload = "<script>alert(1)</script><img src=x onerror=alert(1)> a private word"
    project.write("votes", [VOTE, VOTE | {"choice": payload, "annotator": payload}])
    project.write("comparisons", [COMPARISON | {payload: 1, "chosen": payload}, {"prompt": payload, payload: 1}])
    for out in ("one", "two"):
        project.run(out=out)
    one = project.root / "one"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {f"{name}.parquet" for name in TABLES} | {"quarantine.jsonl", "index.html"}
    for path in files:
        assert (one / path).read_bytes() == (project.root / "two" / path).read_bytes(), path
        if path.suffix == ".html":
            page = (one / path).read_text()
            assert not re.search(r"<script|<img|<link|<iframe|onerror|https?://|alert\(1\)|private", page), path
    page = (one / "data_docs/votes.html").read_text()
    assert "values must belong to this set" in page
    assert "50% unexpected" in page


@pytest.mark.skipif(not REAL.exists(), reason="the shared real data are not on this machine")
def test_hh_rlhf_shows_its_known_dirt(project):
    project.data = {"comparisons": str(REAL / "hh-rlhf/harmless-base.test.jsonl.gz")}
    metrics = project.run(max_bad_share=0.01, heldout_share=0.2)
    found = [(entry["line"] - 1, entry["codes"]) for entry in project.quarantine()]
    empty = [(row, ["chosen.empty"]) for row in (86, 516, 925, 1103)]
    assert found == empty + [(row, ["transcripts.part_early"]) for row in (1254, 1688, 1950, 1952, 2036)]
    assert metrics["kinds"]["comparisons"]["warnings"] == {"turns.alternate": 9}
    assert metrics["rows_kept"] == 2303


@pytest.mark.skipif(not REAL.exists(), reason="the shared real data are not on this machine")
def test_pandalm_shows_its_known_dirt(project):
    items = json.loads(gzip.decompress((REAL / "pandalm/testset-v1.json.gz").read_bytes()))
    names = {"chosen": "response1", "rejected": "response2"}
    rows = [
        {"prompt": f"{item['instruction']}\n\n{item['input']}", **{name: item[old] for name, old in names.items()}}
        for item in items
    ]
    project.data = {}
    project.write("comparisons", rows)
    figures = project.run(heldout_share=0.2)["kinds"]["comparisons"]
    reasons = figures["reasons"]
    assert reasons["chosen.type"] + reasons["rejected.type"] == 6
    assert reasons["chosen.empty"] + reasons["rejected.empty"] == 54
    assert (figures["rows_duplicate"], figures["judged_again"]) == (0, 102)


ZERO_WIDTH, SOFT_HYPHEN, BRAILLE_BLANK = "\u200b", "\u00ad", "\u2800"


@pytest.mark.parametrize("nothing", [ZERO_WIDTH, f" {SOFT_HYPHEN}\n", "\ufeff\u2060", BRAILLE_BLANK, "\u3164"])
def test_text_with_nothing_to_see_is_empty_in_every_kind(project, nothing):
    project.write("demonstrations", [*DEMONSTRATIONS, {"prompt": "p", "response": nothing}])
    project.write("prompts", [{"prompt": "Well?"}, {"prompt": nothing}, {"prompt": "q", "id": nothing}])
    project.write("comparisons", [COMPARISON, COMPARISON | {"chosen": nothing}])
    project.write("votes", [VOTE, VOTE | {"response_b": nothing}])
    ranking = {"prompt": "Ask?", "responses": ["x", "y"], "ranking": [1, 2]}
    project.write("rankings", [ranking, ranking | {"responses": ["x", nothing]}])
    grade = {"prompt": "Ask?", "response": "x", "score": 1}
    project.write("graded", [grade, grade | {"response": nothing}])
    project.run()
    codes = [(entry["kind"], entry["line"], entry["codes"]) for entry in project.quarantine()]
    assert codes == [
        ("demonstrations", 7, ["response.empty"]),
        ("prompts", 2, ["prompt.empty"]),
        ("prompts", 3, ["id.empty"]),
        ("graded", 2, ["response.empty"]),
        ("votes", 2, ["response_b.empty"]),
        ("comparisons", 2, ["chosen.empty"]),
        ("rankings", 2, ["responses.empty"]),
    ]


def test_pairs_that_differ_in_what_cannot_be_seen_alone_are_no_pairs(project):
    unseen = [f"Go{ZERO_WIDTH}od.", f"Good.{SOFT_HYPHEN}", "\u202aGood.\u202c"]
    rows = [COMPARISON | {"rejected": text} for text in unseen]
    project.write("comparisons", [COMPARISON, *rows])
    ranking = {"prompt": "Ask?", "responses": ["Good.", "x", "y"], "ranking": [1, 2, 3]}
    project.write("rankings", [ranking | {"responses": ["Good.", "x", unseen[0]]}, ranking])
    project.write("votes", [VOTE, VOTE | {"response_a": "Good.", "response_b": unseen[1]}])
    project.run()
    found = {(entry["kind"], entry["line"]): entry["codes"] for entry in project.quarantine()}
    places = [("comparisons", 2), ("comparisons", 3), ("comparisons", 4), ("votes", 2), ("rankings", 1)]
    assert found == {place: ["responses.same"] for place in places}


def test_empty_replies_that_people_judged_are_kept_where_that_is_asked_for(project):
    rows = [COMPARISON, COMPARISON | {"rejected": " "}, COMPARISON | {"chosen": "", "rejected": "\u200b"}]
    project.write("comparisons", rows)
    project.write("rankings", [{"prompt": "Ask?", "responses": ["x", ""], "ranking": [1, 2]}])
    project.write("graded", [{"prompt": "Ask?", "response": "", "score": 0}])
    project.write("votes", [VOTE | {"response_b": ""}])
    project.write("demonstrations", [*DEMONSTRATIONS, {"prompt": "p", "response": ""}])
    project.run(keep_empty_responses=True)
    assert [(entry["kind"], entry["line"], entry["codes"]) for entry in project.quarantine()] == [
        ("demonstrations", 7, ["response.empty"]),
        ("comparisons", 3, ["responses.same"]),
    ]
    assert [row["rejected"] for row in project.table("comparisons")] == ["Bad.", ""]
    assert (project.table("votes")[0]["response_b"], project.table("graded")[0]["response"]) == ("", "")


def test_too_many_empty_replies_are_refused_with_the_setting_that_keeps_them(project):
    project.write("rankings", [{"prompt": "Q?", "responses": ["x", ""], "ranking": [1, 2]}])
    with pytest.raises(DataError, match=r"none is left\. Fix: mend .*, or keep .*validate\.keep_empty_responses: true"):
        project.run()
    project.write("demonstrations", [{"prompt": "Q?", "response": ""}])
    with pytest.raises(DataError, match=r"quarantine\.jsonl$"):
        project.run(out="again")


def test_an_empty_reply_that_people_preferred_is_no_demonstration(project):
    project.data = {}
    rows = [COMPARISON | {"prompt": f"Ask {i}?"} for i in range(20)]
    project.write("comparisons", [*rows, COMPARISON | {"prompt": "Nothing?", "chosen": ""}])
    project.run(keep_empty_responses=True, heldout_share=0.2)
    assert {row["response"] for row in project.table("demonstrations")} == {"Good."}


def test_prompts_that_are_nearly_transcripts_are_read_and_named(project, capsys):
    near = transcript("Lamp?", "")[:-1]
    rows = [COMPARISON | {"prompt": text} for text in (near, near + " ", near.lstrip(), near + "\n")]
    project.write("comparisons", [*rows, COMPARISON | {"prompt": "x", "chosen": near + " B", "rejected": near + " C"}])
    project.run()
    assert [row["prompt"] for row in project.table("comparisons")] == [near] * 4
    assert [(entry["line"], entry["code"]) for entry in project.entries("warnings")] == [
        (line, "prompt.reformed") for line in (2, 3, 4)
    ]
    assert [entry["codes"] for entry in project.quarantine()] == [["row.form"]]
    said = (
        "warning: comparisons.jsonl: line 2: prompt: nearly a transcript, and read as one (prompt.reformed, 3 of 5 rows"
    )
    assert said in capsys.readouterr().out


def test_a_column_that_nobody_reads_spoils_no_row(project, capsys):
    gap = pa.array([float("nan"), 1.0, None])
    chosen = ["a", "b\x00", "c"]
    table = {"prompt": ["p"] * 3, "chosen": chosen, "rejected": ["x"] * 3, "id": [1.0, 2.0, None], "uid": ["u"] * 3}
    pq.write_table(pa.table(table | {"reward_gap": gap}), project.root / "c.parquet")
    project.data["comparisons"] = "c.parquet"
    project.write("votes", [json.dumps(VOTE)[:-1] + ', "meta": {"a": NaN, "b": "\\u0000", "b": 1e999}}'])
    figures = project.run()["kinds"]
    assert [row["id"] for row in project.table("comparisons")][:1] == ["1"]
    assert [(entry["codes"], entry["reason"]) for entry in project.quarantine()] == [
        (["row.unreadable"], "chosen: control character U+0000")
    ]
    assert figures["comparisons"]["unknown_fields"] == ["reward_gap", "uid"]
    assert (figures["votes"]["rows_kept"], figures["votes"]["unknown_fields"]) == (1, ["meta"])
    said = (
        "warning: c.parquet: columns that comparisons do not have are left out: 'reward_gap' (2 rows), 'uid' (2 rows)"
    )
    assert said in capsys.readouterr().out


def test_votes_alone_give_every_table_a_run_needs(project, capsys):
    """Demonstrations are what the majority prefers: of three votes a, a, b; ties and undecided pairs give none."""
    project.data = {}
    rows = [
        VOTE | {"prompt": f"Ask {number}?", "annotator": name, "choice": choice}
        for number in range(30)
        for name, choice in zip("xyz", "aab", strict=True)
    ]
    project.write("votes", [*rows, VOTE | {"prompt": "Equal?", "choice": "tie"}])
    project.run(heldout_share=None)
    heldout = {row["prompt"] for row in project.table("heldout_prompts")}
    assert 0 < len(heldout) < 10
    expected = {(f"Ask {number}?", "x", "votes", "train") for number in range(30)}
    found = {(row["prompt"], row["response"], row["source"], row["split"]) for row in project.table("demonstrations")}
    assert found == {row for row in expected if row[0] not in heldout}
    said = "warning: data: names no heldout_prompts and no heldout_share: 0.1 of the prompt groups are held out"
    assert said in capsys.readouterr().out


def test_ratings_alone_give_every_table_a_run_needs(project):
    """Demonstrations are the responses with the highest mean; a prompt whose responses are equal, or one, has none."""
    project.data = {}
    scores = {"x": (1, 5), "y": (4, 4), "z": (1, 2)}
    rows = [
        {"prompt": f"Ask {number}?", "response": response, "score": score, "annotator": name}
        for number in range(30)
        for response, given in scores.items()
        for name, score in zip(("kim", "lee"), given, strict=True)
    ]
    equal = [{"prompt": "Equal?", "response": response, "score": 3} for response in "xy"]
    project.write("graded", [*rows, *equal, {"prompt": "Alone?", "response": "x", "score": 5}])
    figures = project.run(heldout_share=0.2)
    heldout = {row["prompt"] for row in project.table("heldout_prompts")}
    found = {(row["prompt"], row["response"], row["source"]) for row in project.table("demonstrations")}
    assert found == {(f"Ask {number}?", "y", "graded") for number in range(30) if f"Ask {number}?" not in heldout}
    assert (figures["tables"]["ratings"], figures["tables"]["graded"]) == (183, 93)
    sides = {row["prompt"]: row["split"] for row in project.table("ratings")}
    assert {prompt for prompt, side in sides.items() if side == "heldout"} == heldout


def test_a_share_of_few_prompts_holds_out_one_of_them(project):
    project.data = {}
    project.write("comparisons", [COMPARISON | {"prompt": f"Ask {number}?"} for number in range(4)])
    project.run(heldout_share=0.001)
    (heldout,) = project.table("heldout_prompts")
    by_side = {row["prompt"]: row["split"] for row in project.table("comparisons")}
    assert [prompt for prompt, side in by_side.items() if side == "heldout"] == [heldout["prompt"]]
    assert len(project.table("demonstrations")) == 3


def test_malformed_tool_calls_go_to_the_quarantine_under_a_code_of_their_own(project: DataProject) -> None:
    broken = {"role": "assistant", "tool_calls": [{"function": {"name": "stock", "arguments": "{"}}]}
    lonely = {"role": "tool", "content": "3"}
    last = {"role": "assistant", "content": "Well."}
    rows = [
        {"messages": WITH_TOOLS, "tools": TOOLS},
        {"messages": [*WITH_TOOLS[:2], broken, last]},
        {"messages": [*WITH_TOOLS[:2], lonely, last]},
        {"prompt": "How?", "response": "So.", "tools": "hammer"},
        {"messages": WITH_TOOLS, "tools": TOOLS},
    ]
    project.write("demonstrations", rows)
    metrics = project.run()
    found = {entry["line"]: (entry["codes"], entry["reason"]) for entry in project.quarantine()}
    assert {line: codes for line, (codes, _) in found.items()} == {
        2: ["tools.form"], 3: ["tools.form"], 4: ["tools.form"], 5: ["row.duplicate"]
    }  # fmt: skip
    assert found[2][1].startswith("messages: message 3: tool call 1: arguments are not JSON")
    assert found[3][1] == "messages: message 3 has role 'tool', but no message before it calls a tool"
    assert found[4][1].startswith("tools are not JSON")
    assert metrics["kinds"]["demonstrations"]["reasons"] == {"row.duplicate": 1, "tools.form": 3}
    (row,) = project.table("demonstrations")
    assert (row["prompt"], row["response"]) == (parse_messages(WITH_TOOLS, TOOLS).prompt, "3 of them.")
    assert "form of tools" in (project.root / "out/data_docs/demonstrations.html").read_text()


def test_without_tools_nothing_is_checked_of_them(project: DataProject) -> None:
    project.run()
    assert "form of tools" not in (project.root / "out/data_docs/demonstrations.html").read_text()
