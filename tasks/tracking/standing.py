"""Where a version stands, asked without moving anything: its gates, and how it fares against the champion."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_core.config import Params
from rlhf_core.evaluation.selection import confidence_of_attempt
from tasks.tracking.attempts import (
    Attempts,
    attempts_so_far,
    gates_by_attempt,
    judged_prompts,
    win_rate_low_over_sft,
)
from tasks.tracking.audit import read_audit
from tasks.tracking.compare import manifest_of, responses_of, versus
from tasks.tracking.gates import Gate, gates_for
from tasks.tracking.names import CHAMPION, POLICY_MODEL, ModelVersion
from tasks.tracking.registry import aliases_of, answering, resolve
from tasks.tracking.store import Store, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What `promote` would go by.

    Attributes:
        version: the one that is asked about.
        champion: version number of its model's champion; None where there is none.
        gates: every rule that it is held against.
        against: the A/B against the champion on the same prompts (`compare.versus`); empty where there is none.
        prompts: identity of the evaluation prompts that the win rates are on; empty where none are recorded.
        attempts: how often versions were held against SFT and the champion on these prompts, this time included; the
            win rates have the part of the error that is left.
        note: why there is no A/B although another version is champion, else empty.
    """

    version: ModelVersion
    champion: int | None
    gates: tuple[Gate, ...]
    against: Mapping[str, Any]
    prompts: str = ""
    attempts: Attempts = field(default_factory=Attempts)
    note: str = ""

    @property
    def is_champion(self) -> bool:
        """Whether it is champion already."""
        return self.champion == self.version.version

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that it does not pass."""
        return tuple(gate for gate in self.gates if not gate.passed)


def standing_of(root: Path, reference: str, params: Params) -> Standing:
    """Hold a version against the gates and the champion of now; nothing is moved and nothing goes on the trail.

    Args:
        reference: `rlhf-policy@candidate`, `rlhf-policy/3`.
        params: give the gates, the judge (first of `evaluate.judges`), the first temperature and the confidence.

    Raises:
        ConfigError: there is no such version.
        EnvironmentProblem: the store is away.
    """
    store = open_store(root)
    with answering():
        version = resolve(store, reference)
        return stand(store, version, aliases_of(store, version.name).get(CHAMPION), params)


def stand(store: Store, version: ModelVersion, champion: int | None, params: Params) -> Standing:
    """`standing_of` in a store that is open, against this champion."""
    against, note, manifest, prompts = None, "", manifest_of(store, version), ""
    confidence, attempts, judged = params.evaluate.confidence, Attempts(), version
    if version.name == POLICY_MODEL:
        prompts = judged_prompts(responses_of(store, version))
        attempts = attempts_so_far(read_audit(store.home), version, champion, prompts)
        low = win_rate_low_over_sft(version.metrics, confidence, attempts.at_sft)
        judged = replace(version, metrics={**version.metrics, "win_rate_low": low})
        if champion not in (None, version.version):
            other, judge = resolve(store, f"{version.name}/{champion}"), params.evaluate.judges[0]
            level = confidence_of_attempt(confidence, attempts.at_champion)
            against, note = versus(store, version, other, judge, level, params.evaluate.temperatures[0])
    gates = gates_by_attempt(gates_for(judged, manifest, params.gates, against), attempts)
    return Standing(
        version=version,
        champion=champion,
        gates=gates,
        against=against or {},
        prompts=prompts,
        attempts=attempts,
        note=note,
    )
