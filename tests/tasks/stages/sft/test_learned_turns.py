"""Supervised fine-tuning learns no reply that is held out, in whatever dialogue it stands; the rest it learns."""

from pathlib import Path

import pytest
from support.validate import DataProject, dialogue

from rlhf_core.config import Params
from rlhf_core.errors import DataError
from tasks.frame.definition import StageDefinition
from tasks.frame.stage import Progress, Stage
from tasks.stages.sft import run as sft
from tasks.stages.sft.learned_turns import LearnedTurns

PROMPT = dialogue("Good day.", "Yes?", "Thank you.", "My pleasure.", "And why?")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataProject:
    monkeypatch.chdir(tmp_path)
    project = DataProject(tmp_path)
    project.write("heldout_prompts", [{"prompt": "Thank you."}, {"prompt": "And why?"}])
    project.write("demonstrations", [{"prompt": PROMPT, "response": "Because."}])
    project.write("prompts", [{"prompt": "Good morning?"}])
    return project


def learned(project: DataProject, *kept: dict[str, str], every: bool = True) -> tuple[list[str], int]:
    """The replies of the one demonstration that are learned, and how many are not."""
    project.run(out="artifacts/validate")
    turns = LearnedTurns(kept, every=every)
    (found,) = turns.of(project.table("demonstrations", "artifacts/validate"))
    return [reply for _, reply in found], turns.figures()["turns_held_out"]


def judge(project: DataProject, prompt: str, response: str) -> None:
    project.write("comparisons", [{"prompt": prompt, "chosen": response, "rejected": "Go away."}])


def test_other_replies_to_a_short_held_out_prompt_are_learned(project: DataProject) -> None:
    """Half of all dialogues have a `Thank you.`: one that is held out says nothing about theirs."""
    judge(project, "Thank you.", "You are welcome.")
    assert learned(project) == (["Yes?", "My pleasure.", "Because."], 0)


def test_the_held_out_reply_is_not_learned_wherever_it_stands(project: DataProject) -> None:
    judge(project, "thank  you.", "MY pleasure.\u200b")
    assert learned(project) == (["Yes?", "Because."], 1)


def test_a_reply_to_another_question_is_another_reply(project: DataProject) -> None:
    judge(project, "And why?", "My pleasure.")
    assert learned(project) == (["Yes?", "My pleasure.", "Because."], 0)


@pytest.mark.parametrize(("every", "left"), [(True, ["Yes?", "My pleasure."]), (False, [])])
def test_nor_is_it_learned_as_the_last_reply(project: DataProject, every: bool, left: list[str]) -> None:
    judge(project, "And why?", "Because.")
    assert learned(project, every=every) == (left, 1)


def test_a_short_held_out_prompt_of_two_questions_is_known_by_both(project: DataProject) -> None:
    project.write("heldout_prompts", [{"prompt": dialogue("Hm.", "My pleasure.", "And why?")}])
    judge(project, dialogue("Hm.", "My pleasure.", "And why?"), "Because.")
    assert learned(project) == (["Yes?", "My pleasure.", "Because."], 0)


@pytest.mark.parametrize("question", ["And why?", "Tell me at last why."])
def test_what_is_kept_for_the_held_out_loss_is_not_learned_later_in_a_dialogue(
    project: DataProject, question: str
) -> None:
    project.write("heldout_prompts", [{"prompt": "Held-out?"}])
    prompt = dialogue("Good day.", "Yes?", question)
    project.write("demonstrations", [{"prompt": prompt, "response": "Because."}])
    assert learned(project, {"prompt": question, "response": "Because."}) == (["Yes?"], 1)


def test_the_held_out_loss_keeps_a_long_question_with_any_reply_but_a_short_one_with_its_own(
    project: DataProject,
) -> None:
    project.write("heldout_prompts", [{"prompt": "Held-out?"}])
    prompt = dialogue("And where?", "Here.", "Tell me at last why.")
    project.write("demonstrations", [{"prompt": prompt, "response": "Because."}])
    kept = {"prompt": "Tell me at last why.", "response": "No."}
    assert learned(project, kept, {"prompt": "Why?", "response": "Because."}) == (["Here."], 1)


def test_demonstrations_of_held_out_replies_alone_are_refused(project: DataProject) -> None:
    """Both rows end in the held-out reply; were the turns before it learned too, there would be some left."""
    again = dialogue("Good evening.", "Yes?", "And why?")
    project.write("demonstrations", [{"prompt": prompt, "response": "Because."} for prompt in (PROMPT, again)])
    judge(project, "And why?", "Because.")
    project.run(out="artifacts/validate")
    params = Params.model_validate({"sft": {"turns": "last", "heldout_share": 0.0}})
    definition = StageDefinition(name="sft", deps=(), params=(), outs=())
    stage = Stage(definition, params, project.root, project.root / "out", Progress(project.root / "progress.jsonl"))
    with pytest.raises(DataError, match=r"all 2 turns are held-out replies\. Fix: give other demonstrations"):
        sft.run(stage)
