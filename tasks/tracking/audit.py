"""The trail of promotions: one JSON line for each attempt, each with the hash of the line before it.

The trail is also what rollback reads: which version stood as champion and as previous before the last promotion.
"""

import getpass
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from rlhf_core.errors import EnvironmentProblem
from tasks import paths

AUDIT_FILE = paths.STATE / "audit.jsonl"
FIRST = "0" * 64

Action = Literal["promote", "rollback", "refuse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRow:
    """One attempt to move the champion.

    Attributes:
        action: what was asked for and done; `refuse` is a promotion that was not.
        outcome: `intended` is written before an alias moves; `done` or `abandoned` closes it, with the same `attempt`.
        attempt: number that ties the two rows together; counts from 1.
        model: registered model.
        version: the champion afterwards; None where a rollback leaves none.
        champion_before, previous_before: versions that the aliases pointed at.
        reason: of a refusal, or what a person gave.
        gates: each gate with figure, limit and whether it passed.
        outputs_hash: content of the version.
        prompts: identity of the evaluation prompts that the gates' win rates are on (`attempts.prompts_key`).
        time: seconds since 1970.
        who: user and machine.
        before: SHA-256 of the row before.
    """

    action: Action
    outcome: Literal["intended", "done", "abandoned"]
    attempt: int
    model: str
    version: int | None
    champion_before: int | None
    previous_before: int | None
    reason: str = ""
    gates: Sequence[Mapping[str, Any]] = ()
    outputs_hash: str = ""
    prompts: str = ""
    time: float = field(default_factory=time.time)
    who: str = ""
    before: str = FIRST


def read_audit(root: Path) -> list[AuditRow]:
    """Every row, the oldest first.

    Raises:
        EnvironmentProblem: a row was changed or taken out.
    """
    path = paths.home(root) / AUDIT_FILE
    rows, before = [], FIRST
    for number, line in enumerate(_whole_lines(path), start=1):
        row = AuditRow(**json.loads(line))
        if row.before != before:
            raise EnvironmentProblem(
                f"{path}:{number}: the row before it was changed or removed. Fix: restore the file from a copy"
            )
        before = sha256(line.encode()).hexdigest()
        rows.append(row)
    return rows


def append_audit(root: Path, row: AuditRow) -> AuditRow:
    """Write one row and return it, with its place in the chain, once it is on the disk. The caller holds the lock."""
    path = paths.home(root) / AUDIT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _whole_lines(path)
    before = sha256(lines[-1].encode()).hexdigest() if lines else FIRST
    chained = {**asdict(row), "before": before, "who": f"{_user()}@{socket.gethostname()}"}
    with path.open("ab") as file:
        file.truncate(sum(len(line.encode()) + 1 for line in lines))  # a row cut short by a kill was never written
        file.write((json.dumps(chained, sort_keys=True, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    return AuditRow(**chained)


def open_attempt(rows: Sequence[AuditRow], model: str) -> AuditRow | None:
    """The attempt on a model that was begun and never closed, because its process died."""
    mine = [row for row in rows if row.model == model and row.action != "refuse"]
    return mine[-1] if mine and mine[-1].outcome == "intended" else None


def standing_promotion(rows: Sequence[AuditRow], model: str) -> AuditRow | None:
    """The newest promotion of a model that no rollback has undone."""
    stack: list[AuditRow] = []
    for row in rows:
        if row.model != model or row.outcome != "done":
            continue
        if row.action == "promote":
            stack.append(row)
        elif row.action == "rollback" and stack:
            stack.pop()
    return stack[-1] if stack else None


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
