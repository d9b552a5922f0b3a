"""Validation keeps dialogues and named units on one side, and whatever stands between the sides on none."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.validate import DataProject, dialogue

from rlhf_core.data.cleaning.splits import is_heldout, next_heldout
from rlhf_core.errors import DataError
from rlhf_core.text.identity import prompt_group, seen_turns

TREES = Path(__file__).parents[5] / "shared/data/open-assistant/en_100_tree.jsonl.gz"
ASK = "How do I boil an egg?"


def prompts(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": text} for text in texts]


def messages(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return DataProject(tmp_path)


def test_a_held_out_prompt_is_known_in_every_disguise(project):
    """The first turn of each dialogue is the held-out prompt; none may be trained on, none is lost without a word."""
    project.write("heldout_prompts", prompts(ASK))
    project.write("comparisons", [
        {"prompt": prompt, "chosen": "Gently.", "rejected": "No."}
        for prompt in (
            ASK, " how do i boil\u200b an  EGG? ", f"\n\nHuman: {ASK}\n\nAssistant:", "Where is the lamp today?",
            f"\n\nHuman: {ASK}\n\nAssistant: In water.\n\nHuman: And then?\n\nAssistant:",
            f"Be brief.\n\nHuman: {ASK}\n\nAssistant:",
        )
    ])  # fmt: skip
    project.run()
    sides = [row["split"] for row in project.table("comparisons")]
    assert sides == ["heldout"] * 3 + ["train"] + ["heldout"] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages(ASK, "Gently.")},
        {"messages": messages(ASK, "In water.", "And then?", "Wait.")},
        {"messages": messages(ASK, "Gently.", system="Be brief.")},
        {"prompt": "how do i boil\u2060 an EGG?", "response": "Gently."},
    ],
)
def test_a_demonstration_of_a_named_held_out_prompt_is_refused(project, row):
    project.write("heldout_prompts", prompts(ASK))
    project.write("demonstrations", [{"prompt": "Where is the lamp?", "response": "Here."}, row])
    with pytest.raises(DataError, match=r"demonstrations.jsonl:2: prompt: 1 prompts are held-out ones too"):
        project.run()


def test_a_dialogue_that_asks_it_later_is_left_out_and_counted(project, capsys):
    """With `sft.turns: all` the reply to the held-out question would be learned, one turn before the last."""
    project.write("heldout_prompts", prompts(ASK, "Thank you."))
    later = messages("Good morning.", "Hello.", f"{ASK}\u200b", "Gently.", "And then?", "Wait.")
    polite = messages("Where is the lamp?", "Here.", "Thank you.", "You are welcome.")
    project.write("demonstrations", [{"messages": later}, {"messages": polite}])
    metrics = project.run()
    assert [row["response"] for row in project.table("demonstrations")] == ["You are welcome."]
    (entry,) = project.quarantine()
    assert (entry["line"], entry["codes"]) == (1, ["split.asked_later"])
    kind = metrics["kinds"]["demonstrations"]
    assert (kind["rows_between_sides"], kind["rows_bad"], kind["rows_kept"]) == (1, 0, 1)
    assert "warning: demonstrations.jsonl: 1 rows are left out: they ask later" in capsys.readouterr().out


def test_a_short_prompt_asked_later_is_known_by_the_turns_before_it(project):
    """`Where now?` means nothing alone; held out is what it means after `Hi!` and `Lost?`: four words in all."""
    project.write("heldout_prompts", prompts(dialogue("Hi there!", "Lost?", "Where now?")))
    again = dialogue("Good day.", "Yes?", "hi there!", "Lost?", "Where  now?")
    project.write("comparisons", [
        {"prompt": prompt, "chosen": f"To the left, {number}.", "rejected": "No."}
        for number, prompt in enumerate((
            again,
            dialogue("Good day.", "Yes?", "Hi there!", "Lost?", "Where now?", "Left.", "Thanks."),
            dialogue("Good day.", "Yes?", "Where now?"),
            dialogue("Good day.", "Yes?", "Hi there!", "Hello.", "Where now?"),
        ))
    ])  # fmt: skip
    metrics = project.run()
    assert [row["chosen"] for row in project.table("comparisons")] == ["To the left, 2.", "To the left, 3."]
    assert [entry["codes"] for entry in project.quarantine()] == [["split.asked_later"]] * 2
    assert metrics["kinds"]["comparisons"]["rows_between_sides"] == 2


THANKS = dialogue("Good day.", "Yes?", "Thank you.")


def test_a_held_out_reply_to_a_short_prompt_is_not_judged_in_training_either(project, capsys):
    """Held out is `Thank you.`, with two replies. Rows that judge one of them elsewhere go, others stay."""
    project.write("heldout_prompts", prompts("Thank you."))
    held = {"prompt": "thank you. ", "chosen": "My pleasure.", "rejected": "Go away."}
    project.write("comparisons", [
        held,
        {"prompt": THANKS, "chosen": "MY pleasure.", "rejected": "No."},
        {"prompt": THANKS, "chosen": "Any time.", "rejected": "Go\u200b away."},
        {"prompt": THANKS, "chosen": "Any time.", "rejected": "No."},
        {"prompt": dialogue("Good day.", "Yes?", "Thank you.", "And?", "Nothing."), "chosen": "My pleasure.",
         "rejected": "No."},
    ])  # fmt: skip
    project.write("rankings", [{"prompt": THANKS, "responses": ["So?", "My pleasure."], "ranking": [1, 2]}])
    project.write("graded", [{"prompt": THANKS, "response": "My pleasure.", "score": 1}])
    project.write("votes", [
        {"prompt": THANKS, "response_a": "x", "response_b": "my pleasure.", "annotator": "ann", "choice": "a"}
    ])  # fmt: skip
    metrics = project.run()
    kept = [(row["chosen"], row["split"]) for row in project.table("comparisons")]
    assert kept == [("My pleasure.", "heldout"), ("Any time.", "train"), ("My pleasure.", "train")]
    set_aside = sorted((entry["kind"], entry["line"], *entry["codes"]) for entry in project.quarantine())
    assert set_aside == [
        ("comparisons", 2, "split.held_reply"), ("comparisons", 3, "split.held_reply"),
        *((kind, 1, "split.held_reply") for kind in ("graded", "rankings", "votes")),
    ]  # fmt: skip
    assert metrics["kinds"]["comparisons"]["rows_between_sides"] == 2
    assert "comparisons.jsonl: 2 rows are left out: they judge a held-out reply" in capsys.readouterr().out


def test_one_prompt_in_two_forms_is_one_row(project):
    forms = ("Where is it?", "where\u200b is  IT?", "\n\nHuman: Where is it?\n\nAssistant:", "Why?")
    project.write("prompts", prompts(*forms))
    project.write("heldout_prompts", prompts(ASK, ASK.upper()))
    metrics = project.run()
    assert [row["prompt"] for row in project.table("prompts")] == ["Where is it?", "Why?"]
    assert len(project.table("heldout_prompts")) == 1
    assert [metrics["kinds"][kind]["rows_duplicate"] for kind in ("prompts", "heldout_prompts")] == [2, 1]


def rows_of_users(**more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Ask {i}?", "chosen": "Yes.", "rejected": "No.", "user": f"user {i % 20}", **more}
        for i in range(200)
    ]


def test_a_named_column_is_split_as_a_whole(project):
    del project.data["heldout_prompts"], project.data["demonstrations"]
    project.write("comparisons", rows_of_users())
    metrics = project.run(heldout_share=0.3, split_by="user")
    sides = {row["prompt"]: row["split"] for row in project.table("comparisons")}
    of_users = {i % 20: {sides[f"Ask {j}?"] for j in range(i % 20, 200, 20)} for i in range(20)}
    assert all(len(found) == 1 for found in of_users.values())
    held = {user for user, found in of_users.items() if found == {"heldout"}}
    assert held == {user for user in range(20) if is_heldout(f"user user {user}", 0.3)}
    assert 2 <= len(held) <= 10
    assert metrics["kinds"]["comparisons"]["unknown_fields"] == []
    assert {row["group"] for row in project.table("heldout_groups")} == {
        prompt_group(prompt) for prompt, side in sides.items() if side == "heldout"
    }


def test_training_rows_on_prompts_of_held_out_units_are_left_out(project, capsys):
    del project.data["heldout_prompts"], project.data["demonstrations"]
    held, free = (
        next(f"u{i}" for i in range(99) if is_heldout(f"user u{i}", 0.3) is wanted) for wanted in (True, False)
    )
    rows = [
        *rows_of_users(),
        *({"prompt": "Same?", "chosen": "Yes.", "rejected": "No.", "user": user} for user in (held, free)),
    ]
    project.write("comparisons", [{**row, "id": str(number)} for number, row in enumerate(rows)])
    metrics = project.run(heldout_share=0.3, split_by="user")
    assert [row["split"] for row in project.table("comparisons") if row["prompt"] == "Same?"] == ["heldout"]
    assert metrics["kinds"]["comparisons"]["rows_between_sides"] == 1
    assert [entry["codes"] for entry in project.quarantine()] == [["split.held_elsewhere"]]
    assert "1 training rows have prompts that are held out with another user" in capsys.readouterr().out


def test_rows_without_the_column_are_counted_and_a_column_that_nobody_has_is_refused(project, capsys):
    del project.data["heldout_prompts"], project.data["demonstrations"]
    project.write("comparisons", [*rows_of_users(), {"prompt": "New?", "chosen": "Yes.", "rejected": "No."}])
    project.run(heldout_share=0.3, split_by="user")
    assert "comparisons.jsonl: 1 of 201 rows have no 'user' (data.split_by)" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"data.split_by: no row of .* has a value in the column 'debate'. Fix: name"):
        project.run(out="again", heldout_share=0.3, split_by="debate")


def test_rows_without_the_column_are_on_the_side_of_their_prompt(project):
    """Prompts and grades that know no users: what a held-out user was asked is held out there too, and not lost."""
    del project.data["heldout_prompts"], project.data["demonstrations"]
    project.write("comparisons", rows_of_users())
    project.write("prompts", prompts(*(f"Ask {i}?" for i in range(200))))
    project.write("graded", [{"prompt": f"ask {i}?", "response": "Yes.", "score": 1} for i in range(200)])
    metrics = project.run(heldout_share=0.3, split_by="user")
    sides = {row["prompt"].lower(): row["split"] for row in project.table("comparisons")}
    of_users = {f"ask {i}?" for i in range(200) if is_heldout(f"user user {i % 20}", 0.3)}
    assert of_users <= {prompt for prompt, side in sides.items() if side == "heldout"}
    assert {row["prompt"].lower(): "heldout" for row in project.table("heldout_prompts")}.keys() >= of_users
    assert metrics["kinds"]["prompts"]["rows_between_sides"] == metrics["kinds"]["graded"]["rows_between_sides"] == 0
    assert all(sides.get(row["prompt"], row["split"]) == row["split"] for row in project.table("ratings"))


def test_of_few_units_one_is_held_out_as_a_whole(project):
    del project.data["heldout_prompts"], project.data["demonstrations"]
    rows = [{"prompt": f"Ask {i}?", "chosen": "Yes.", "rejected": "No.", "user": f"u{i % 3}"} for i in range(9)]
    project.write("comparisons", rows)
    metrics = project.run(heldout_share=0.001, split_by="user")
    held = {row["prompt"] for row in project.table("comparisons") if row["split"] == "heldout"}
    first = next_heldout(f"user u{i}" for i in range(3))
    assert held == {row["prompt"] for row in rows if f"user {row['user']}" == first}
    assert metrics["kinds"]["comparisons"]["rows_between_sides"] == 0


def test_grades_alone_are_split_by_dialogue(project):
    """A grade of a later turn stands with its dialogue, and one of a dialogue that asks later is left out."""
    project.data = {}
    asked = [prompt for i in range(40) if not is_heldout(prompt_group(prompt := f"What does lamp {i} cost?"), 0.3)]
    held = next(prompt for i in range(40) if is_heldout(prompt_group(prompt := f"What does lamp {i} cost?"), 0.3))
    turned = f"\n\nHuman: {held}\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant:"
    later = f"\n\nHuman: {asked[0]}\n\nAssistant: Yes.\n\nHuman: {held}\n\nAssistant:"
    project.write("graded", [
        {"prompt": prompt, "response": response, "score": score}
        for prompt in [*asked, held, turned, later]
        for response, score in (("x", 1), ("y", 2))
    ])  # fmt: skip
    metrics = project.run(heldout_share=0.3)
    assert metrics["kinds"]["graded"]["rows_between_sides"] == 2
    assert {row["prompt"] for row in project.table("ratings") if row["split"] == "train"} == set(asked)
    assert {row["prompt"] for row in project.table("heldout_prompts")} == {held, turned}
    assert {row["prompt"] for row in project.table("demonstrations")} == set(asked)


def ranked(node: dict[str, Any], before: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Best against worst reply of every prompter's turn of a tree, as TRL's rows of messages."""
    said = [*before, {"role": "user", "content": node["text"]}]
    replies = sorted((reply for reply in node["replies"] if reply.get("rank") is not None), key=lambda one: one["rank"])
    if len(replies) > 1:
        sides = [[*said, {"role": "assistant", "content": reply["text"]}] for reply in (replies[0], replies[-1])]
        yield {"chosen": sides[0], "rejected": sides[1]}
    for reply in node["replies"]:
        for turn in reply["replies"]:
            yield from ranked(turn, [*said, {"role": "assistant", "content": reply["text"]}])


@pytest.mark.skipif(not TREES.exists(), reason="real data are not here")
def test_no_dialogue_of_open_assistant_stands_on_both_sides(project):
    del project.data["heldout_prompts"], project.data["demonstrations"]
    trees = [json.loads(line) for line in gzip.decompress(TREES.read_bytes()).decode().splitlines()]
    project.write("comparisons", [json.dumps(row) for tree in trees for row in ranked(tree["prompt"], [])])
    project.run(heldout_share=0.2)
    rows = project.table("comparisons")
    first = {
        side: {seen_turns(row["prompt"])[0].content for row in rows if row["split"] == side}
        for side in ("train", "heldout")
    }
    assert not first["train"] & first["heldout"]
    assert min(map(len, first.values())) > 10
    trained = {(row["prompt"], row["chosen"]) for row in rows if row["split"] == "train"}
    heldout = [row["prompt"] for row in rows if row["split"] == "heldout"]
    assert not [prompt for prompt in heldout for asked, reply in trained if prompt.startswith(f"{asked} {reply}")]
