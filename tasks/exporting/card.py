"""The card of an exported model: README.md with the head that hubs read, made from the version's lineage alone.

The head is written by `huggingface_hub`. Figures stand in it (`model-index`) only where nothing of them is simulated.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.config.data import SOURCE_ROWS
from rlhf_core.config.evaluation import JUDGE_ROWS
from rlhf_core.state.atomic import digest_of
from tasks.exporting.parity import Parity
from tasks.exporting.subject import Subject
from tasks.lineage.manifest import bars_promotion, flat_params
from tasks.lineage.provenance import UNKNOWN, hub_source

LIBRARIES = {"hf": "transformers", "adapter": "peft", "gguf": "gguf", "onnx": "onnx"}
PIPELINES = {"policy": "text-generation", "reward": "text-classification"}
OF_THE_LAST_STEP = "last_"
"""Figures of one training step: they stand in the manifest and say nothing of what the model is worth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card is made of.

    Attributes:
        subject: the version.
        format: of the export.
        licence: of the exported model.
        parity: what the check of the export found.
        limits: what this format loses or cannot, a sentence each.
        loading: an example, a block of Markdown.
    """

    subject: Subject
    format: str
    licence: str
    parity: Parity
    limits: tuple[str, ...]
    loading: str

    def text(self) -> str:
        """README.md."""
        parts = (_title, _training, _figures, _gates, _parity, _lineage, _licence, _limits, _loading)
        head = f"---\n{head_of(self)}\n---\n"
        return head + "\n\n".join(text for part in parts if (text := "\n".join(part(self)))) + "\n"


def head_of(card: Card) -> str:
    """The YAML that hubs read."""
    from huggingface_hub import ModelCardData

    subject = card.subject
    results = _results(subject)
    data = ModelCardData(
        license=card.licence,
        base_model=found[0] if (found := hub_source(subject.pretrained)) else None,
        datasets=_hub_datasets(subject) or None,
        library_name=LIBRARIES[card.format],
        pipeline_tag=PIPELINES[subject.kind],
        tags=["rlhf", subject.stage.replace("@", "-"), "reward-model" if subject.kind == "reward" else "policy"],
        model_name=subject.reference.replace("/", "-") if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def simulated_parts(subject: Subject) -> list[str]:
    """What of the run that made the version was simulated, a sentence each."""
    params = flat_params(subject.manifest["params"])
    source = SOURCE_ROWS.get(params.get("label.source", "simulated"))
    judges = params.get("evaluate.judges") or ("gold",)
    rows = [source, *(row for name, row in JUDGE_ROWS.items() if name in judges)]
    return [row.simulated for row in rows if row is not None and row.simulated]


def _results(subject: Subject) -> list[Any]:
    """Figures that were measured on what people said, in the form of `model-index`."""
    from huggingface_hub import EvalResult

    wanted = {"reward": ("pairwise_accuracy",), "policy": ("win_rate", "heldout_loss")}[subject.kind]
    if simulated_parts(subject):
        return []
    return [
        EvalResult(
            task_type=PIPELINES[subject.kind],
            dataset_type=(_hub_datasets(subject) or ["custom"])[0],
            dataset_name=f"held-out rows of the run (data {subject.manifest['data_hash'][:12]})",
            metric_type=name,
            metric_value=round(float(value), 6),
        )
        for name in wanted
        if (value := subject.metrics.get(name)) is not None
    ]


def _hub_datasets(subject: Subject) -> list[str]:
    notes = subject.manifest.get("data_files", {}).values()
    return sorted({found[0] for note in notes if (found := hub_source(note))})


def _title(card: Card) -> Iterator[str]:
    subject = card.subject
    kind = "A reward model: one score for a prompt and a response" if subject.kind == "reward" else "A language model"
    base = subject.pretrained
    start = f"from the pretrained model `{_origin(base)}`" if base else "from scratch"
    yield f"# {subject.reference}\n"
    yield f"{kind}, trained {start} by stage `{subject.stage}` of rlhf-pipeline, in the form `{card.format}`."
    if parts := simulated_parts(subject):
        yield f"\n**Simulated:** {'; '.join(parts)}. Its figures say nothing about people."


def _training(card: Card) -> Iterator[str]:
    manifest = card.subject.manifest
    kinds: Mapping[str, Any] = manifest["metrics"].get("validate", {}).get("kinds", {})
    hashes: Mapping[str, str] = manifest["outputs"].get("validate", {})
    yield f"## Training data\n\nData folder `{manifest['data_hash'] or 'none under DVC'}` (DVC's hash)."
    if kinds:
        yield "\n| kind | rows read | kept | set aside | SHA-256 of the table |\n|---|---|---|---|---|"
    for name, found in kinds.items():
        digest = hashes.get(f"artifacts/validate/{name}.parquet", "")[:16]
        yield f"| {name} | {found.get('rows_in')} | {found.get('rows_kept')} | {found.get('rows_bad')} | `{digest}` |"
    pairs: Mapping[str, Any] = manifest["metrics"].get("preferences", {})
    if pairs:
        digest = manifest["outputs"].get("preferences", {}).get("artifacts/preferences/train.parquet", "")[:16]
        train, heldout = pairs.get("pairs_train"), pairs.get("pairs_heldout")
        yield f"\nPreference pairs: {train} to train on (`{digest}`), {heldout} held out."
    for path, note in manifest.get("data_files", {}).items():
        yield f"\n`{path}`: {note['source']} at `{note['commit'][:12]}`, licence {note['licence']}."


def _figures(card: Card) -> Iterator[str]:
    metrics = card.subject.metrics
    if not metrics:
        return
    yield "## Figures\n\n| figure | value | interval |\n|---|---|---|"
    ends = {f"{name}{end}" for name in metrics for end in ("_low", "_high")}
    for name, value in sorted(metrics.items()):
        if name not in ends and not name.startswith(OF_THE_LAST_STEP):
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            yield f"| {name} | {'undefined' if value is None else f'{value:.6g}'} | {interval} |"


def _gates(card: Card) -> Iterator[str]:
    if card.subject.gates:
        yield "## Gates\n\nAs `params.yaml` had them when this folder was made.\n"
    for gate in card.subject.gates:
        yield f"- {'passed' if gate.passed else '**failed**'}: {gate.text}"


def _parity(card: Card) -> Iterator[str]:
    yield "## Is it the model that was trained?\n"
    yield f"Read back by {card.parity.program} in a process without rlhf-pipeline: {card.parity}."


def _lineage(card: Card) -> Iterator[str]:
    subject, manifest = card.subject, card.subject.manifest
    barring = bars_promotion(manifest["git"]["files"])
    dirty = f", with uncommitted changes of {', '.join(barring)}" if barring else ""
    yield "## Lineage\n"
    yield f"- version `{subject.reference}`, content `{subject.content}`"
    yield f"- code at commit `{manifest['git']['commit']}`{dirty}"
    yield f"- `dvc.lock` (SHA-256) `{lock_digest(manifest)}`"
    yield f"- parameters `{manifest['params_hash']}`"
    for stage, content in parents_of(subject).items():
        yield f"- from stage `{stage}`, weights `{content}`"
    for path, note in manifest.get("model_folders", {}).items():
        yield f"- `{path}` ({note['key']}): {_origin(note)}"
    yield "\nAll of it, and the SHA-256 of every file, stands in `rlhf_manifest.json`; `rlhf models verify` checks it."


def lock_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the `dvc.lock` that a version carries, as `sha256sum dvc.lock` prints it."""
    return hashlib.sha256(manifest["dvc_lock"].encode()).hexdigest()


def parents_of(subject: Subject) -> dict[str, str]:
    """The stages whose models the version was made from, with a digest of each model's files."""
    found = {}
    for stage, files in subject.manifest["outputs"].items():
        weights = {path: digest for path, digest in files.items() if "/model/" in path}
        if weights and stage != subject.stage:
            found[stage] = digest_of(weights)
    return found


def _licence(card: Card) -> Iterator[str]:
    base = card.subject.pretrained
    said = "nobody said under which; ask before use" if card.licence == UNKNOWN else f"`{card.licence}`"
    yield f"## Licence\n\n{said[0].upper()}{said[1:]}."
    if base and base.get("licence", UNKNOWN) not in (UNKNOWN, card.licence):
        yield f"The pretrained model is under `{base['licence']}`, whose conditions go on."


def _limits(card: Card) -> Iterator[str]:
    subject = card.subject
    yield "## Limits\n"
    prompt, response = subject.limit("max_prompt_tokens"), subject.limit("max_response_tokens")
    yield f"- trained on prompts of at most {prompt} and responses of at most {response} tokens"
    yield from (f"- {limit}" for limit in card.limits)


def _loading(card: Card) -> Iterator[str]:
    yield f"## How to load it\n\n{card.loading}"


def _origin(note: Mapping[str, Any] | None) -> str:
    if not note:
        return UNKNOWN
    commit = f" at `{note['commit'][:12]}`, licence {note['licence']}" if "commit" in note else ""
    changed = f", changed since: {', '.join(note['changed'])}" if note.get("changed") else ""
    return f"{note['source']}{commit}{changed}"
