"""Votes of a blind comparison, as rows of the record kind `votes`, appended one by one."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from rlhf_core.errors import DataError, EnvironmentProblem
from rlhf_core.text.normal import normal_form
from rlhf_core.text.tool_turns import Message
from rlhf_core.text.transcripts import render_turns

Verdict = Literal["a", "b", "tie", "both bad"]
FOLDER = Path("votes")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlindVote:
    """What somebody said of two answers, in the order in which they were shown.

    Attributes:
        turns: the dialogue, the user's turn last.
        answers, versions: the first shown and the second.
        seconds: from the end of the second answer to the vote.
        settings: what the answers were written with, as columns of their own.
    """

    turns: Sequence[Message]
    answers: tuple[str, str]
    versions: tuple[str, str]
    verdict: Verdict
    annotator: str
    seconds: float
    settings: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """The row: `both bad` is a tie whose column `verdict` says more.

        Raises:
            DataError: the dialogue cannot be written as a prompt.
        """
        return {
            "prompt": prompt_of(self.turns),
            "response_a": self.answers[0],
            "response_b": self.answers[1],
            "annotator": self.annotator,
            "choice": "tie" if self.verdict == "both bad" else self.verdict,
            "seconds": round(self.seconds, 1),
            "verdict": self.verdict,
            "version_a": self.versions[0],
            "version_b": self.versions[1],
            **self.settings,
        }


def prompt_of(turns: Sequence[Message]) -> str:
    """A dialogue as the data files have it: a single question as it stands, else `Human:` and `Assistant:`.

    Raises:
        DataError: a turn has a line that would be read as another turn.
    """
    if len(turns) == 1:
        return turns[0]["content"]
    try:
        return render_turns(turns)
    except ValueError as error:
        raise DataError(f"the dialogue cannot be kept as a prompt: {error}. Fix: /new") from None


def why_no_vote(answers: tuple[str, str]) -> str:
    """Why two answers cannot be compared, empty where they can: stage `validate` would set their row aside."""
    if not all(normal_form(answer) for answer in answers):
        return "an answer is empty"
    return "both say the same" if normal_form(answers[0]) == normal_form(answers[1]) else ""


def append_vote(file: Path, vote: BlindVote) -> None:
    """Put a vote behind those of a file; it is on the disk when this returns, whole or not at all for a reader.

    Raises:
        DataError: see `BlindVote.row`.
        EnvironmentProblem: the file cannot be written.
    """
    line = (json.dumps(vote.row(), ensure_ascii=False) + "\n").encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")), file.open("ab+") as votes:
            votes.seek(0, os.SEEK_END)
            if votes.tell():
                votes.seek(-1, os.SEEK_END)
                line = line if votes.read(1) == b"\n" else b"\n" + line  # behind half a line of a write that broke off
            votes.write(line)
            votes.flush()
            os.fsync(votes.fileno())
    except OSError as error:
        raise EnvironmentProblem(f"{file}: the vote cannot be written ({error}). Fix: --votes FILE") from None
