"""Promotion, rollback and rebuilding as Prefect flows: what `rlhf models` does, with a record in the UI."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.flow_log import end_in_one_line
from flows.root import find_root
from rlhf_core.errors import RlhfError
from tasks import paths
from tasks.lineage.reproduce import reproduce
from tasks.params import load_params
from tasks.tracking import promote, read_manifest, rollback

PROMOTION_SECONDS = 15 * 60
REBUILD_SECONDS = 24 * 3600
Reference = Annotated[
    str,
    Field(
        pattern=r"^rlhf-(sft|reward|policy)(@[a-z]+|/[0-9]+)$",
        description="name@alias or name/number, such as rlhf-policy@candidate",
    ),
]
Model = Literal["rlhf-policy", "rlhf-reward", "rlhf-sft"]


@flow(name="rlhf-promote", persist_result=False, retries=0, timeout_seconds=PROMOTION_SECONDS)
def promote_flow(version: Reference = "rlhf-policy@candidate", reason: str = "") -> State:
    """Make a version champion if it passes every gate of params.yaml.

    Args:
        version: which one.
        reason: kept in the audit trail.
    """
    end_in_one_line()
    root = find_root(Path.cwd())
    try:
        done = promote(root, version, params=load_params(root / paths.PARAMS), reason=reason)
    except RlhfError as error:
        create_markdown_artifact(f"**Refused**: {error}", key="promotion", description=f"Promotion of {version}")
        return Failed(message=str(error))
    rows: list[dict[str, Any]] = [{**asdict(gate), "passed": gate.passed} for gate in done.gates]
    create_table_artifact(rows, key="promotion-gates", description=f"Gates of {done.model}/{done.champion}")
    return Completed(message=f"{done.model}/{done.champion} is champion, before it {done.champion_before}")


@flow(name="rlhf-rollback", persist_result=False, retries=0, timeout_seconds=PROMOTION_SECONDS)
def rollback_flow(model: Model = "rlhf-policy", reason: str = "") -> State:
    """Give `champion` back to the version that had it before.

    Args:
        model: registered model.
        reason: kept in the audit trail.
    """
    end_in_one_line()
    try:
        done = rollback(find_root(Path.cwd()), model, reason=reason)
    except RlhfError as error:
        return Failed(message=str(error))
    return Completed(message=f"{done.model}: champion is {done.champion}, before it {done.champion_before}")


@flow(name="rlhf-reproduce", persist_result=False, retries=0, timeout_seconds=REBUILD_SECONDS)
def reproduce_flow(version: Reference = "rlhf-policy@champion") -> State:
    """Rebuild a version from its manifest in a clean worktree and compare every file.

    Args:
        version: which one.
    """
    end_in_one_line()
    try:
        root = find_root(Path.cwd())
        found_version, manifest = read_manifest(root, version)
        found = reproduce(root, str(found_version), manifest)
    except RlhfError as error:
        return Failed(message=str(error))
    create_markdown_artifact(str(found), key="reproduction", description=f"Rebuilding of {version}")
    return Completed(message=str(found)) if found.identical else Failed(message=str(found))
