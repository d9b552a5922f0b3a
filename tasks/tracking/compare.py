"""Two versions side by side: what went into them, what they score, and how they answered the same prompts."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.config.evaluation import JUDGE_ROWS, JudgeName
from rlhf_core.state.atomic import digest_of
from tasks import paths
from tasks.lineage.manifest import bars_promotion, flat_params
from tasks.tracking.names import MANIFEST, RESPONSES, SCORING_MODEL, ModelVersion, evidence_folder
from tasks.tracking.registry import answering, fetch_evidence, fetch_from_version, find_version, resolve
from tasks.tracking.store import Store, open_store

REWARD_MODEL = "reward_model"

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `compare_versions` finds. In every pair A comes first.

    Attributes:
        a, b: the versions.
        lineage: lineage tags that differ.
        outputs: upstream stages whose files differ -> number of files that differ.
        parameters: dotted keys of `params.yaml` that differ.
        metrics: figure -> its two values and, where both are recorded, their bounds (`low`, `high`).
        ab: A against B on the same prompts, one entry a temperature: `judge`, `temperature`, and what
            `rlhf_core.evaluation.ab.compare_scores` returns; empty where one of them has no recorded responses.
        note: why there is no A/B, else empty.
    """

    a: ModelVersion
    b: ModelVersion
    lineage: Mapping[str, tuple[str, str]]
    outputs: Mapping[str, int]
    parameters: Mapping[str, tuple[Any, Any]]
    metrics: Mapping[str, Mapping[str, Any]]
    ab: tuple[Mapping[str, Any], ...]
    note: str = ""


def compare_versions(root: Path, a: str, b: str, *, judge: JudgeName, confidence: float) -> Comparison:
    """Compare two versions, given as `name@alias` or `name/number`.

    Args:
        judge: one of `evaluate.judges` that gives scores: the column of the recorded responses that decides the A/B.
            Scores of two different reward models cannot be held against each other: A's reward model then scores both
            sides anew.
        confidence: level of the intervals.

    Raises:
        ConfigError: there is no such version.
        EnvironmentProblem: the store is away.
    """
    store = open_store(root)
    with answering():
        return _compared(store, resolve(store, a), resolve(store, b), judge, confidence)


def _compared(
    store: Store, first: ModelVersion, second: ModelVersion, judge: JudgeName, confidence: float
) -> Comparison:
    manifest_a, manifest_b = manifest_of(store, first), manifest_of(store, second)
    ab, note = _on_same_prompts(store, first, second, judge, confidence)
    return Comparison(
        a=first,
        b=second,
        lineage=differences(_lineage(first, manifest_a), _lineage(second, manifest_b)),
        outputs=differing_files(manifest_a["outputs"], manifest_b["outputs"]),
        parameters=differences(flat_params(manifest_a["params"]), flat_params(manifest_b["params"])),
        metrics=paired_metrics(first.metrics, second.metrics),
        ab=ab,
        note=note,
    )


def read_manifest(root: Path, reference: str) -> tuple[ModelVersion, dict[str, Any]]:
    """Find a version and the lineage that it carries (see `tasks.lineage.manifest.build_manifest`).

    Raises:
        ConfigError: there is no such version.
        EnvironmentProblem: the store is away.
    """
    store = open_store(root)
    version = resolve(store, reference)
    return version, manifest_of(store, version)


def versus(
    store: Store, a: ModelVersion, b: ModelVersion, judge: JudgeName, confidence: float, temperature: float
) -> tuple[Mapping[str, Any], str]:
    """The A/B of two versions at one temperature; empty where it cannot be had, with the reason."""
    entries, note = _on_same_prompts(store, a, b, judge, confidence)
    found = next((entry for entry in entries if entry["temperature"] == temperature), {})
    return found, note if found or note else f"{a} and {b} were not both judged at temperature {temperature:g}"


def manifest_of(store: Store, version: ModelVersion) -> dict[str, Any]:
    """The lineage that a version carries.

    Raises:
        EnvironmentProblem: it cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = fetch_from_version(store, version, MANIFEST, Path(scratch))
        return dict(json.loads(path.read_text(encoding="utf-8")))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both; None stands for a key that one side lacks."""
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def differing_files(a: Mapping[str, Mapping[str, str]], b: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """Stages of two manifests whose files differ, with the number of files that do, in the order of A and then B."""
    counts = {stage: len(differences(a.get(stage, {}), b.get(stage, {}))) for stage in dict.fromkeys([*a, *b])}
    return {stage: count for stage, count in counts.items() if count}


def paired_metrics(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
    """Figures of two versions beside each other; `x_low` and `x_high` become the interval of `x`."""
    bounds = {f"{key}{end}" for key in {*a, *b} for end in ("_low", "_high") if f"{key}_low" in {*a, *b}}
    return {
        key: {
            "a": a.get(key),
            "b": b.get(key),
            "a_interval": _interval(a, key),
            "b_interval": _interval(b, key),
        }
        for key in sorted({*a, *b} - bounds)
    }


def join_scores(a: Sequence[Row], b: Sequence[Row], judge: JudgeName) -> dict[float, tuple[list[float], list[float]]]:
    """Scores of A and of B for the prompts that both answered, by temperature, in the order of A."""
    answers = {(row["prompt_id"], row["temperature"]): row[judge] for row in b}
    joined: dict[float, tuple[list[float], list[float]]] = {}
    for row in a:
        other = answers.get((row["prompt_id"], row["temperature"]))
        if row[judge] is not None and other is not None:
            ours, theirs = joined.setdefault(row["temperature"], ([], []))
            ours.append(row[judge])
            theirs.append(other)
    return joined


def _on_same_prompts(
    store: Store, a: ModelVersion, b: ModelVersion, judge: JudgeName, confidence: float
) -> tuple[tuple[Mapping[str, Any], ...], str]:
    """The A/B at each temperature, or none and why."""
    if SCORING_MODEL in (a.name, b.name):
        return (), "reward models write no responses"
    rows_a, rows_b = responses_of(store, a), responses_of(store, b)
    for version, rows in ((a, rows_a), (b, rows_b)):
        if not rows:
            return (), f"{version} has no recorded responses; run the stage evaluate"
        if judge not in rows[0]:
            return (), f"{version} was not judged by {judge!r}"
    if JUDGE_ROWS[judge].reads_folder and not same_judge_folder(manifest_of(store, a), manifest_of(store, b)):
        return (), (
            f"{judge!r} is the model of a folder, and that it was the same for both is not on record (`rlhf models "
            "fetch` notes a folder's origin)"
        )
    if JUDGE_ROWS[judge].of_the_run and reward_hash(manifest_of(store, a)) != reward_hash(manifest_of(store, b)):
        scored = _score_anew(store, a, rows_a, rows_b)
        if scored is None:
            return (), f"the two were scored by different reward models, and that of {a} is not in the registry"
        return _entries(join_scores(*scored, judge), judge, confidence)
    return _entries(join_scores(rows_a, rows_b, judge), judge, confidence)


def _entries(
    joined: Mapping[float, tuple[list[float], list[float]]], judge: JudgeName, confidence: float
) -> tuple[tuple[Mapping[str, Any], ...], str]:
    from rlhf_core.evaluation.ab import compare_scores

    tie_within = JUDGE_ROWS[judge].tie_within
    entries = tuple(
        {"judge": judge, "temperature": temperature, **compare_scores(ours, theirs, confidence, tie_within)}
        for temperature, (ours, theirs) in joined.items()
    )
    return entries, "" if entries else "no prompt was answered and judged for both at one temperature"


def same_judge_folder(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two manifests note one origin of the judge's folder, as it was fetched."""
    noted = [
        note
        for manifest in (a, b)
        for note in manifest.get("model_folders", {}).values()
        if note["key"] == "evaluate.judge_model" and note.get("commit") and not note.get("changed")
    ]
    return len(noted) == 2 and noted[0]["commit"] == noted[1]["commit"]


def reward_hash(manifest: Mapping[str, Any]) -> str:
    """Outputs hash of the reward model that a manifest names; empty where it names none."""
    return model_hash(manifest, "reward")


def model_hash(manifest: Mapping[str, Any], stage: str) -> str:
    """Outputs hash of the model that a stage made for a version; empty where the version is not made from it."""
    before = f"{(paths.stage_output(stage) / 'model').as_posix()}/"
    files = manifest["outputs"].get(stage, {})
    model = {path.removeprefix(before): digest for path, digest in files.items() if path.startswith(before)}
    return digest_of({"stage": stage, "files": model}) if model else ""


def _score_anew(
    store: Store, a: ModelVersion, rows_a: Sequence[Row], rows_b: Sequence[Row]
) -> tuple[list[Row], list[Row]] | None:
    judge = find_version(store, SCORING_MODEL, reward_hash(manifest_of(store, a)))
    if judge is None:
        return None
    from mlflow import pyfunc

    with tempfile.TemporaryDirectory() as scratch:
        model = pyfunc.load_model(str(fetch_from_version(store, judge, "", Path(scratch))))

        def score(rows: Sequence[Row]) -> list[Row]:
            scores = model.predict([{"prompt": row["prompt"], "response": row["response"]} for row in rows])
            return [{**row, REWARD_MODEL: value} for row, value in zip(rows, scores, strict=True)]

        return score(rows_a), score(rows_b)


def responses_of(store: Store, version: ModelVersion) -> list[Row]:
    """What a version answered to the evaluation prompts; empty where that was not recorded."""
    import pyarrow.parquet as pq  # here: `rlhf status` takes this package, and answers at once

    with tempfile.TemporaryDirectory() as scratch:
        path = fetch_evidence(store, version, f"{evidence_folder(version)}/{RESPONSES}", Path(scratch))
        return pq.read_table(path).to_pylist() if path else []


def _lineage(version: ModelVersion, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Lineage tags; `git_dirty` without files that the manifest carries: `dvc.lock` grows with every stage of a run."""
    shown = ("git_commit", "data_hash", "params_hash", "stage")
    made_with = json.dumps(manifest["environment"], sort_keys=True)
    files = manifest["git"]["files"]
    code = {name: files[name] for name in bars_promotion(files)}
    tags = {key: version.tags.get(key, "") for key in shown}
    return tags | {"environment": made_with, "git_dirty": digest_of(code) if code else "clean"}


def _interval(metrics: Mapping[str, float | None], key: str) -> tuple[float, float] | None:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return (low, high) if low is not None and high is not None else None
