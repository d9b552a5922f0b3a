"""Conversations in a terminal: one version, and two blind whose votes become data."""

import json

import pytest

from flows.chat.speaker import Manner, shown, speak
from flows.chat.talk import BlindSession, compare_blind, shown_order, talk
from flows.chat.votes import BlindVote, append_vote, why_no_vote
from rlhf_core.data.reading.readers import read_rows
from rlhf_core.data.reading.records import to_record
from rlhf_core.rollout.token_draw import OPEN
from rlhf_core.text.transcripts import prompt_turns
from tasks.stages.label.files import voted

MANNER = Manner(temperature=1.0, cut_off=OPEN, max_tokens=20, seed=3)


class Script:
    """A terminal at which somebody types these lines, and then no more."""

    def __init__(self, *lines):
        self.lines, self.seen, self.asked = list(lines), "", []

    def ask(self, question):
        self.asked.append(question)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def show(self, text):
        self.seen += text


def session(models, file):
    return BlindSession(policies=(models["policy"], models["plain"]), annotator="ann", file=file)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_dialogue_goes_on_with_what_was_said_and_streams(models):
    policy, terminal = (
        models["policy"],
        Script("An answer?", "", "/help", "And another one?", "/new", "Be kind.", "/quit", "x"),
    )
    talk(policy, terminal, MANNER, "Be kind.")
    said = [piece.split("\n")[0] for piece in terminal.seen.split("policy> ")[1:]]
    assert len(said) == 3
    system = {"role": "system", "content": "Be kind."}
    first = [system, {"role": "user", "content": "An answer?"}]
    pieces: list[str] = []
    one = speak(policy, first, MANNER, 0, pieces.append)
    assert terminal.seen.split("policy> ")[1].startswith(one.text)
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces) == one.text
    later = [*first, {"role": "assistant", "content": one.text}, {"role": "user", "content": "And another one?"}]
    assert terminal.seen.split("policy> ")[2].startswith(speak(policy, later, MANNER, 1, pieces.append).text)
    afresh = [system, {"role": "user", "content": "Be kind."}]
    assert terminal.seen.split("policy> ")[3].startswith(speak(policy, afresh, MANNER, 2, pieces.append).text)
    assert terminal.lines == ["x"]


def test_a_dialogue_that_grows_too_long_loses_its_oldest_turns_and_says_so(models):
    turns = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "An answer."}] * 3
    asked = [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "And another one?"}]
    spoken = speak(models["policy"], asked, MANNER, 0, lambda text: None)
    assert spoken.turns_left_out == 4
    kept = [asked[0], *asked[5:]]
    assert speak(models["policy"], kept, MANNER, 0, lambda text: None).text == spoken.text
    terminal = Script("word " * 400)
    talk(models["policy"], terminal, MANNER)
    assert "this question has" in terminal.seen


def test_a_blind_vote_is_a_row_that_the_pipeline_reads_and_the_versions_are_shown_at_the_end_alone(models, tmp_path):
    file = tmp_path / "votes/ann.jsonl"
    questions = [f"Question {number}?" for number in range(6)]
    typed = [questions[0], "a", "/new", questions[1], "b", "/new", questions[2], "t", "/new"]
    typed += [questions[3], "x", questions[4], "s", questions[5], "nonsense", "a"]
    terminal, blind = Script(*typed), session(models, file)
    compare_blind(blind, terminal, MANNER)
    before, _, end = terminal.seen.partition("6 questions: ")
    assert "policy" not in before
    assert "plain" not in before
    kept = rows(file)
    assert [row["choice"] for row in kept] == ["a", "b", "tie", "tie", "a"]
    assert [row["verdict"] for row in kept] == ["a", "b", "tie", "both bad", "a"]
    assert [row["prompt"] for row in kept] == [*questions[:4], questions[5]]
    for row in kept:
        assert {row["version_a"], row["version_b"]} == {"policy", "plain"}
        assert (row["annotator"], row["seed"], row["temperature"]) == ("ann", 3, 1.0)
        assert row["seconds"] >= 0
        for letter in "ab":  # each answer is of the version that the row names
            turns = [{"role": "user", "content": row["prompt"]}]
            spoken = speak(models[row[f"version_{letter}"]], turns, MANNER, row["question"], lambda text: None)
            assert row[f"response_{letter}"] == spoken.text
    assert len({row["version_a"] for row in kept}) == 2, "both orders occur"
    wins = [row["version_a" if row["choice"] == "a" else "version_b"] for row in kept if row["choice"] != "tie"]
    assert end.startswith(
        f"policy {wins.count('policy')} · plain {wins.count('plain')} · tie 1 · both bad 1 · skipped 1"
    )
    assert f"5 votes in {file}: rlhf run --data votes={file}" in end
    records = [to_record("votes", row) for row in read_rows(file)]
    assert not [record.problem for record in records if record.problem]
    ballots = list(voted([{**record.values, **split(record)} for record in records]))
    assert [ballot.votes[0].choice for ballot in ballots] == ["a", "b", "tie", "tie", "a"]
    assert all(ballot.shown for ballot in ballots)


def split(record):
    return {"prompt_id": record.values["prompt"], "pair_id": record.values["prompt"], "split": "train"}


def test_the_dialogue_goes_on_with_the_answer_that_was_preferred(models, tmp_path):
    file = tmp_path / "ann.jsonl"
    terminal = Script("One?", "b", "Two?", "x", "Three?", "a")
    compare_blind(session(models, file), terminal, MANNER, "Be kind.")
    one, two, three = rows(file)
    spoken = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"}]
    assert prompt_turns(one["prompt"]) == spoken
    spoken.append({"role": "assistant", "content": one["response_b"].strip()})
    assert prompt_turns(two["prompt"]) == [*spoken, {"role": "user", "content": "Two?"}]
    assert prompt_turns(three["prompt"]) == [*spoken, {"role": "user", "content": "Three?"}], (
        "of both bad nothing stays"
    )


def test_the_end_of_what_is_typed_within_a_vote_keeps_those_before(models, tmp_path):
    file = tmp_path / "ann.jsonl"
    terminal = Script("One?", "a", "Two?")
    compare_blind(session(models, file), terminal, MANNER)
    assert len(rows(file)) == 1
    assert "2 questions: " in terminal.seen
    assert "skipped 1" in terminal.seen


def test_the_same_version_twice_gets_no_vote_and_its_words_no_row(models, tmp_path):
    blind = BlindSession(policies=(models["policy"],) * 2, annotator="ann", file=tmp_path / "v.jsonl")
    terminal = Script("One?", "/quit")
    compare_blind(blind, terminal, MANNER)
    assert "(both say the same: no vote)" in terminal.seen
    assert not blind.file.exists()
    assert why_no_vote(("a", "\u200b ")) == "an answer is empty"
    assert why_no_vote(("A  b", "a b")) == "both say the same"
    assert not why_no_vote(("a", "b"))


def test_orders_are_by_chance_and_by_the_seed():
    orders = [shown_order(5, number) for number in range(400)]
    assert 150 < orders.count((0, 1)) < 250
    assert orders == [shown_order(5, number) for number in range(400)]
    assert orders != [shown_order(6, number) for number in range(400)]


def test_a_vote_behind_a_line_that_broke_off_is_a_line_of_its_own(tmp_path):
    file = tmp_path / "v.jsonl"
    vote = BlindVote(
        turns=[{"role": "user", "content": "One?"}], answers=("a", "ü"), versions=("x", "y"), verdict="a",
        annotator="ann", seconds=1.26, settings={"seed": 1},
    )  # fmt: skip
    file.write_text('{"prompt": "half')
    append_vote(file, vote)
    append_vote(file, vote)
    half, first, second = file.read_text().splitlines()
    assert half == '{"prompt": "half'
    assert json.loads(first) == json.loads(second) == vote.row()
    assert vote.row()["seconds"] == 1.3


@pytest.mark.parametrize(("text", "seen"), [("a\x1b[2Jb", "a[2Jb"), ("a\u202eb\x9bc", "abc"), ("ä\n\tb", "ä\n\tb")])
def test_what_a_terminal_would_obey_is_not_shown(text, seen):
    assert shown(text) == seen
