"""Whether an export is the version: what a stranger finds in the folder, held against the version's own answers."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.errors import EnvironmentProblem, GateRefused
from rlhf_core.state.atomic import temporary_folder
from tasks.exporting.reference import Reference
from tasks.launch import tied

STRANGER = Path(__file__).parent / "stranger.py"
TOLERANCE = 1e-5
TIE = 1e-4
"""Nats between the two likeliest tokens below which rounding of float32 decides which is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """What was compared and found.

    Attributes:
        what: `log-probabilities` or `scores`.
        rows: prompts, or prompts with a response.
        compared: tokens or scores.
        largest: the largest difference.
        tolerance: that it must not exceed.
        equal: rows with the same greedy tokens to the last; all of them for scores.
        ties: rows that part where the two likeliest tokens are nearer to each other than rounding: no error.
        encoded: prompts of which the exported tokenizer makes the same tokens, of `encodable` that it is asked.
        program: what read the folder.
    """

    what: str
    rows: int
    compared: int
    largest: float
    tolerance: float
    equal: int
    ties: int
    encoded: int
    encodable: int
    program: str

    @property
    def holds(self) -> bool:
        """Whether the export is the version."""
        within = self.largest <= self.tolerance  # false for NaN
        return within and self.equal + self.ties == self.rows and self.encoded == self.encodable

    def __str__(self) -> str:
        greedy = f"greedy tokens equal on {self.equal} of {self.rows} prompts"
        ties = f" ({self.ties} part at a tie)" if self.ties else ""
        tokens = f"prompts encoded alike {self.encoded} of {self.encodable}"
        measured = f"{self.what} of {self.compared} within {self.largest:.1e} (allowed {self.tolerance:.0e})"
        return f"{measured}, {greedy}{ties}, {tokens}" if self.what != "scores" else measured


def check_answers(reference: Reference, reads: str, named: Mapping[str, Any], tolerance: float) -> Parity:
    """Let a stranger answer the same prompts, and compare.

    Args:
        reference: of the version.
        reads: reader of `stranger.READERS`.
        named: what that reader needs, such as `folder`.
        tolerance: the largest difference of log-probabilities.

    Raises:
        GateRefused: the stranger cannot read the folder.
    """
    request = {
        "reads": reads, "rows": list(reference.rows), "new_tokens": reference.new_tokens,
        "ends": list(reference.ends), "pad": reference.pad, **named,
    }  # fmt: skip
    answer = ask_stranger(request)
    rows = list(zip(reference.rows, answer["written"], answer["behind"], strict=True))
    equal = sum(row["response"] == written for row, written, _ in rows)
    ties = sum(_parts_at_tie(row["response"], written, behind) for row, written, behind in rows)
    encoded = [row["ids"] == ids for row, ids in zip(reference.rows, answer["tokens"], strict=True) if row["is_plain"]]
    ours = [value for row in reference.logprobs for value in row]
    theirs = [value for row in answer["logprobs"] for value in row]
    return Parity(
        what="log-probabilities",
        rows=len(rows),
        compared=len(ours),
        largest=largest_difference(ours, theirs),
        tolerance=tolerance,
        equal=equal,
        ties=ties,
        encoded=sum(encoded),
        encodable=len(encoded),
        program=answer["program"],
    )


def check_scores(ours: list[float], dialogues: list[Any], folder: str) -> Parity:
    """Let a stranger score the same dialogues, and compare.

    Raises:
        GateRefused: the stranger cannot read the folder.
    """
    answer = ask_stranger({"reads": "classifier", "folder": folder, "rows": [{"turns": turns} for turns in dialogues]})
    return Parity(
        what="scores",
        rows=len(ours),
        compared=len(ours),
        largest=largest_difference(ours, answer["scores"]),
        tolerance=TOLERANCE,
        equal=len(ours),
        ties=0,
        encoded=len(ours),
        encodable=len(ours),
        program=answer["program"],
    )


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """The largest absolute difference; NaN where one is, which no bound lets pass."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    if any(one != one for one in differences):
        return float("nan")
    return max(differences, default=0.0)


def ask_stranger(request: Mapping[str, Any]) -> dict[str, Any]:
    """Start the program that knows nothing of this project, isolated, and return its answer.

    Raises:
        EnvironmentProblem: a package that the format is read with is missing.
        GateRefused: it failed; the last line that it said is in the message.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with temporary_folder(Path(request["folder"]).absolute().parent, "parity") as scratch:
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-I", str(STRANGER), str(scratch / "request.json"), str(scratch / "answer.json")]
        done = subprocess.run(tied(command), env=kept | quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            if lines[-1].startswith("ModuleNotFoundError"):
                raise EnvironmentProblem(
                    f"{request['reads']}: {lines[-1]}. Fix: pip install 'rlhf-pipeline[onnx,gguf]'"
                )
            raise GateRefused(
                f"{request['reads']}: what was written cannot be read back ({lines[-1]}). Fix: another --format"
            )
        answer: dict[str, Any] = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
        return answer


def _parts_at_tie(ours: list[int], theirs: list[int], behind: list[float]) -> bool:
    """Whether two greedy responses part at a token that is as good as the likeliest, within rounding."""
    place = next((number for number, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    return place is not None and behind[place] < TIE
