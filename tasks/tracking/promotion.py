"""Moving `champion`: gates first, then compare-and-set under a lock, with a trail that survives a kill.

The alias `champion` is the one point of decision. An `intended` row comes before it moves, `previous` and the closing
row after; whoever takes the lock next closes what a killed process left open, by where `champion` points.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlhf_core.config import Params
from rlhf_core.errors import EnvironmentProblem, GateRefused
from rlhf_core.faults import faultpoint
from tasks.catalogue import MODEL_NAMES
from tasks.tracking.attempts import Attempts, attempts_so_far
from tasks.tracking.audit import AuditRow, append_audit, open_attempt, read_audit, standing_promotion
from tasks.tracking.gates import Gate, refusal
from tasks.tracking.names import CHAMPION, PREVIOUS, ModelVersion
from tasks.tracking.registry import GONE, aliases_of, answering, exists, resolve
from tasks.tracking.standing import Standing, stand
from tasks.tracking.store import Store, lock, open_store

LOCK = "promotion"


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """What `promote` or `rollback` did.

    Attributes:
        model: registered model.
        champion: version number now; None where a rollback leaves none.
        champion_before: version number that was champion.
        gates: the rules that were held, empty for a rollback.
        audit: the closing row of the trail.
    """

    model: str
    champion: int | None
    champion_before: int | None
    gates: tuple[Gate, ...]
    audit: AuditRow


def promote(root: Path, reference: str, *, params: Params, reason: str = "") -> Promotion:
    """Make a version champion if it passes every gate and nobody else moved the champion meanwhile.

    Args:
        root: checkout; its `params` give the gates, the judge (first of `evaluate.judges`) and the confidence.
        reference: `rlhf-policy@candidate`, `rlhf-policy/3`.
        reason: a person's words for the trail.

    Raises:
        ConfigError: there is no such version.
        GateRefused: a gate does not pass, the version is champion already, or another promotion won.
        EnvironmentProblem: the store is away.
    """
    store = open_store(root)
    with answering():
        return _promote(store, reference, params, reason)


def _promote(store: Store, reference: str, params: Params, reason: str) -> Promotion:
    version = resolve(store, reference)
    judged_against = aliases_of(store, version.name).get(CHAMPION)
    standing = stand(store, version, judged_against, params)
    gates = standing.gates
    with lock(store.home, LOCK):
        _close_open_attempt(store, version.name)
        aliases, rows = aliases_of(store, version.name), read_audit(store.home)
        champion = aliases.get(CHAMPION)
        problem = (
            _already(version, champion)
            or _overtaken(version, judged_against, champion)
            or _outnumbered(version, standing, attempts_so_far(rows, version, judged_against, standing.prompts))
            or refusal(str(version), gates)
        )
        intended = replace(_intention(store, version, aliases, gates, reason), prompts=standing.prompts)
        if problem:
            append_audit(store.home, replace(intended, action="refuse", outcome="done", reason=problem))
            raise GateRefused(problem)
        closing = _move(store, intended)
    return Promotion(
        model=version.name, champion=version.version, champion_before=champion, gates=tuple(gates), audit=closing
    )


def rollback(root: Path, model: str, *, reason: str = "") -> Promotion:
    """Undo the last promotion of a model that stands: `champion` and `previous` point where they did before it.

    Raises:
        GateRefused: there is no promotion to undo, the champion is not the version that it made champion, or the one
            before was deleted.
        EnvironmentProblem: the store is away.
    """
    if model not in MODEL_NAMES:
        raise GateRefused(f"{model!r}: no registered model. Fix: one of {', '.join(MODEL_NAMES)}")
    store = open_store(root)
    with answering(), lock(store.home, LOCK):
        _close_open_attempt(store, model)
        rows = read_audit(store.home)
        last = standing_promotion(rows, model)
        aliases = aliases_of(store, model)
        champion = aliases.get(CHAMPION)
        if last is None or last.version != champion:
            raise GateRefused(
                f"{model}: no promotion to undo: champion is {_named(model, champion)}, the last promotion on record "
                f"is of {_named(model, last.version if last else None)}. Fix: promote the version you want"
            )
        if last.champion_before is not None and not exists(store, model, last.champion_before):
            raise GateRefused(_gone(model, last.champion_before, "champion before the last promotion"))
        intended = AuditRow(
            action="rollback",
            outcome="intended",
            attempt=len(rows) + 1,
            model=model,
            version=last.champion_before,
            champion_before=champion,
            previous_before=aliases.get(PREVIOUS),
            reason=reason,
        )
        closing = _move(store, intended)
    return Promotion(model=model, champion=last.champion_before, champion_before=champion, gates=(), audit=closing)


def _outnumbered(version: ModelVersion, judged: Standing, now: Attempts) -> str | None:
    if judged.attempts == now:
        return None
    return f"{version}: not promoted: another attempt came between while it was judged. Fix: promote it again"


def _already(version: ModelVersion, champion: int | None) -> str | None:
    if champion != version.version:
        return None
    return f"{version}: not promoted: it is champion already. Fix: none is needed"


def _overtaken(version: ModelVersion, judged_against: int | None, champion: int | None) -> str | None:
    if champion == judged_against:
        return None
    return (
        f"{version}: not promoted: champion moved from {_named(version.name, judged_against)} to "
        f"{_named(version.name, champion)} while it was judged. Fix: compare it with the new champion and promote again"
    )


def _intention(
    store: Store, version: ModelVersion, aliases: Mapping[str, int], gates: Sequence[Gate], reason: str
) -> AuditRow:
    return AuditRow(
        action="promote",
        outcome="intended",
        attempt=len(read_audit(store.home)) + 1,
        model=version.name,
        version=version.version,
        champion_before=aliases.get(CHAMPION),
        previous_before=aliases.get(PREVIOUS),
        reason=reason,
        gates=[{**asdict(gate), "passed": gate.passed} for gate in gates],
        outputs_hash=version.outputs_hash,
    )


def _move(store: Store, intended: AuditRow) -> AuditRow:
    """Move the aliases as intended and close the attempt. The caller holds the lock."""
    append_audit(store.home, intended)
    faultpoint("promotion.noted")
    if not _point(store, intended.model, CHAMPION, intended.version):
        append_audit(store.home, replace(intended, outcome="abandoned", time=time.time()))
        raise GateRefused(_gone(intended.model, intended.version, "to be champion"))
    faultpoint("promotion.champion_moved")
    return _finish(store, intended)


def _finish(store: Store, intended: AuditRow) -> AuditRow:
    """What follows once `champion` has moved; may be done twice."""
    if intended.action == "promote":
        previous = intended.champion_before
    else:
        undone = standing_promotion(read_audit(store.home), intended.model)
        previous = undone.previous_before if undone else None
    _point(store, intended.model, PREVIOUS, previous)
    standing = aliases_of(store, intended.model).get(CHAMPION)
    if standing != intended.version:
        raise EnvironmentProblem(
            f"{intended.model}: champion reads back as {_named(intended.model, standing)} after it was set to "
            f"{_named(intended.model, intended.version)}. Fix: find who else writes to this registry, promote again"
        )
    return append_audit(store.home, replace(intended, outcome="done", time=time.time()))


def _close_open_attempt(store: Store, model: str) -> None:
    """Finish or abandon what a killed process left, by whether `champion` had moved."""
    intended = open_attempt(read_audit(store.home), model)
    if intended is None:
        return
    if aliases_of(store, model).get(CHAMPION) == intended.version:
        _finish(store, intended)
    else:
        append_audit(store.home, replace(intended, outcome="abandoned", time=time.time()))


def _point(store: Store, model: str, alias: str, version: int | None) -> bool:
    """Point an alias at a version, or nowhere for None and for one that was deleted; whether it stands as wanted."""
    from mlflow.exceptions import MlflowException

    if version is not None:
        try:
            store.client.set_registered_model_alias(model, alias, str(version))
            return True
        except MlflowException as error:
            if error.error_code != GONE:
                raise
            if alias == CHAMPION:  # it stays where it is: nothing was there to take its place
                return False
    if alias in aliases_of(store, model):
        store.client.delete_registered_model_alias(model, alias)
    return version is None


def _gone(model: str, version: int | None, what: str) -> str:
    return (
        f"{model}: {_named(model, version)}, {what}, was deleted in the registry. "
        "Fix: promote the version you want (rlhf models list)"
    )


def _named(model: str, version: int | None) -> str:
    return f"{model}/{version}" if version is not None else "none"
