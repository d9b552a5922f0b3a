"""The edge to MLflow: runs, curves, model versions, aliases, promotion. Nothing else in the project imports mlflow.

mlflow takes seconds to import, so it is imported where a store is opened and not here.

Recording, while a pipeline runs; nothing of this raises because the store is away::

    with Recorder(root, run_key="…", name="pipeline", tags={…}, params={…}) as recorder:   # the parent run
        recorder.start_stage("sft", tags={…}, params={…})                # a child run
        recorder.metrics("sft", [{"step": 1, "time": 1.7e9, "metrics": {"loss/train": 4.1}}])
        recorder.artifact("sft", Path("reports/plots/sft.csv"), "plots")
        recorder.finish_stage("sft", "FINISHED", {"heldout_loss": 1.2})
        key = recorder.register("align@ppo", Path("artifacts/align/ppo/model"), {})  # outputs hash
        recorder.attach("align@ppo", key, {"win_rate_low": 0.7, "kl_to_sft": 3.0})   # after evaluate: what gates judge
        recorder.attach_responses("align@ppo", key, Path("artifacts/evaluate/responses.parquet"), rows_of="ppo")
        recorder.set_candidates({"sft": …, "reward": …, "align@ppo": key})   # one lineage, together
        version = recorder.version(key)        # ModelVersion, waits until sent; None while the store is away
    recorder.delivery                                                    # what was sent, what is pending and why
    flush(root)                                                          # sends later what is pending, once

Registry, from the command line and the promotion flow; these need the store and raise `EnvironmentProblem` without it::

    list_versions(root)                     -> list[ModelVersion]
    resolve_version(root, "rlhf-policy@candidate" | "rlhf-policy/3")   -> ModelVersion
    compare_versions(root, a, b, judge="gold", confidence=0.95)        -> Comparison
    promote(root, reference, params=load_params(root / "params.yaml")) -> Promotion, or GateRefused
    standing_of(root, reference, params)    -> Standing: what `promote` would go by, and nothing moved
    rollback(root, "rlhf-policy")           -> Promotion
    read_manifest(root, reference)          -> (ModelVersion, manifest); tasks.lineage.reproduce rebuilds from it
    read_audit(root)                        -> list[AuditRow]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.tracking.audit import AuditRow, read_audit
    from tasks.tracking.compare import Comparison, compare_versions, read_manifest
    from tasks.tracking.delivery import Delivery, flush, pending
    from tasks.tracking.events import DataSet, Judging, Status
    from tasks.tracking.names import ModelVersion
    from tasks.tracking.promotion import Promotion, promote, rollback
    from tasks.tracking.recorder import Recorder
    from tasks.tracking.registry import download_version, list_versions, resolve_version
    from tasks.tracking.standing import Standing, standing_of
    from tasks.tracking.store import Store, open_store, run_link, tracking_uri
    from tasks.tracking.system import SystemWatch

__all__ = [
    "AuditRow",
    "Comparison",
    "DataSet",
    "Delivery",
    "Judging",
    "ModelVersion",
    "Promotion",
    "Recorder",
    "Standing",
    "Status",
    "Store",
    "SystemWatch",
    "compare_versions",
    "download_version",
    "flush",
    "list_versions",
    "open_store",
    "pending",
    "promote",
    "read_audit",
    "read_manifest",
    "resolve_version",
    "rollback",
    "run_link",
    "standing_of",
    "tracking_uri",
]

_MODULES = {
    "AuditRow": "audit",
    "Comparison": "compare",
    "DataSet": "events",
    "Delivery": "delivery",
    "Judging": "events",
    "ModelVersion": "names",
    "Promotion": "promotion",
    "Recorder": "recorder",
    "Standing": "standing",
    "Status": "events",
    "Store": "store",
    "SystemWatch": "system",
    "compare_versions": "compare",
    "download_version": "registry",
    "flush": "delivery",
    "list_versions": "registry",
    "open_store": "store",
    "pending": "delivery",
    "promote": "promotion",
    "read_audit": "audit",
    "read_manifest": "compare",
    "resolve_version": "registry",
    "rollback": "promotion",
    "run_link": "store",
    "standing_of": "standing",
    "tracking_uri": "store",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: `rlhf status` wants one small part of all this, and answers at once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
