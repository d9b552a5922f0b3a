"""Promotion, rollback and rebuilding as flows say the same as the command line does."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

import flows.promote
from rlhf_core.errors import GateRefused
from tasks.catalogue import MODEL_NAMES
from tasks.tracking.gates import Gate

GATE = Gate(name="min_win_rate_low", figure=0.7, limit=0.6, at_least=True, detail="lower bound")


@pytest.fixture(autouse=True)
def artifacts(monkeypatch: pytest.MonkeyPatch, counting_project: Path) -> list[tuple]:
    made: list[tuple] = []
    monkeypatch.chdir(counting_project)
    for kind in ("create_markdown_artifact", "create_table_artifact"):
        monkeypatch.setattr(flows.promote, kind, lambda content, key, description: made.append((key, content)))
    return made


def test_a_promotion_lists_its_gates(monkeypatch: pytest.MonkeyPatch, artifacts: list[tuple]) -> None:
    done = SimpleNamespace(model="rlhf-policy", champion=4, champion_before=3, gates=(GATE,))
    seen = {}
    monkeypatch.setattr(flows.promote, "promote", lambda root, version, **more: seen.update(more, v=version) or done)
    state = flows.promote.promote_flow.fn("rlhf-policy@candidate", "better")
    assert (state.is_completed(), seen["v"], seen["reason"]) == (True, "rlhf-policy@candidate", "better")
    assert seen["params"].align.algorithms == ("ppo", "dpo")
    ((key, rows),) = artifacts
    assert (key, rows[0]["passed"], rows[0]["figure"]) == ("promotion-gates", True, 0.7)


def test_a_refusal_fails_the_flow_and_names_the_figure(monkeypatch: pytest.MonkeyPatch, artifacts: list[tuple]) -> None:
    def refuse(root: Path, version: str, **more: object) -> None:
        raise GateRefused("min_win_rate_low is 0.4, must be >= 0.6")

    monkeypatch.setattr(flows.promote, "promote", refuse)
    state = flows.promote.promote_flow.fn()
    assert state.is_failed()
    assert "0.4" in state.message
    assert "0.4" in artifacts[0][1]


def test_a_rollback_says_who_is_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(model="rlhf-policy", champion=3, champion_before=4)
    monkeypatch.setattr(flows.promote, "rollback", lambda root, model, reason: done)
    state = flows.promote.rollback_flow.fn()
    assert state.message == "rlhf-policy: champion is 3, before it 4"


def test_the_forms_offer_the_models_that_the_stages_register() -> None:
    """Their names are written out, since deployments keep them with the form."""
    assert set(get_args(flows.promote.Model)) == set(MODEL_NAMES)
    (field,) = get_args(flows.promote.Reference)[1:]
    (pattern,) = (one.pattern for one in field.metadata if getattr(one, "pattern", None))
    kinds = re.fullmatch(r"\^rlhf-\((.*?)\)\(.*\)\$", pattern)[1].split("|")
    assert {f"rlhf-{kind}" for kind in kinds} == set(MODEL_NAMES)
    assert all(re.match(pattern, f"{name}@champion") for name in MODEL_NAMES)


@pytest.mark.parametrize("identical", [True, False])
def test_a_rebuild_that_differs_fails_the_flow(monkeypatch: pytest.MonkeyPatch, identical: bool) -> None:
    class Found(SimpleNamespace):
        def __str__(self) -> str:
            return "stage sft differs first"

    monkeypatch.setattr(flows.promote, "read_manifest", lambda root, version: ("rlhf-policy/3", {"stage": "x"}))
    monkeypatch.setattr(flows.promote, "reproduce", lambda root, name, manifest: Found(identical=identical))
    state = flows.promote.reproduce_flow.fn()
    assert state.is_completed() is identical
    assert state.message == "stage sft differs first"


def test_the_form_refuses_what_is_no_version() -> None:
    from prefect.exceptions import ParameterTypeError

    for flow in (flows.promote.promote_flow, flows.promote.reproduce_flow):
        assert "version" in inspect.signature(flow.fn).parameters
        for wrong in ("rlhf-policy", "other@candidate", "rlhf-policy@candidate; rm"):
            with pytest.raises(ParameterTypeError):
                flow.validate_parameters({"version": wrong, **({"reason": ""} if flow.name == "rlhf-promote" else {})})
