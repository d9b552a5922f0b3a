"""What goes from the recorder through the spool to the sender: one class a kind of event, one JSON object a line.

`kind` tells them apart. What is on somebody's disk must be sent: a spool that was written before must read as it did,
so a new field needs a default, and a kind or a field that is there stays.
"""

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

Status = Literal["FINISHED", "FAILED", "KILLED"]
Figures = dict[str, float | None]  # None where a figure is undefined


class Document(BaseModel):
    """Base of all that is in a spool: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Point(NamedTuple):
    """One value of a curve; `time_ms` counts from 1970."""

    name: str
    value: float
    step: int
    time_ms: int


class DataSet(Document):
    """Data that a run read: `digest` has at most 36 characters, `source` is JSON, `context` says what for."""

    name: str
    digest: str
    source: str
    context: str


class Judging(Document):
    """How a policy was compared with SFT, for the description of its version."""

    judge: str
    simulated: bool
    temperature: float
    confidence: float
    num_prompts: int


class Registration(Document):
    """A model version that is asked for.

    Attributes:
        name: registered model.
        stage: the stage that made it.
        content: the outputs hash that its folder must still have.
        manifest: lineage, kept within the logged model.
        tags: of the version.
        params: settings of the stage under dotted keys, shown on the logged model.
        metrics: headline figures.
        example: `prompt` and, for a reward model, `response`.
    """

    name: str
    stage: str
    content: str
    manifest: dict[str, Any]
    tags: dict[str, str]
    params: dict[str, str]
    metrics: Figures
    example: dict[str, str]


class OfRun(Document):
    """An event of a pipeline run, or of a stage's child run; `run` is its key."""

    run: str


class OfVersion(Document):
    """An event of a version: `model` is registered, `outputs_hash` the version's content."""

    model: str
    outputs_hash: str


class WithFile(Document):
    """An event that speaks of a file or folder; `kept` is what `Spool.keep` returned for it."""

    kept: str


class RunEvent(OfRun):
    """A pipeline run begins, or, with the key of its `parent`, a stage's child run."""

    kind: Literal["run"] = "run"
    parent: str | None
    name: str
    tags: dict[str, str]
    time_ms: int


class ParamsEvent(OfRun):
    """Settings of a run, under dotted keys."""

    kind: Literal["params"] = "params"
    params: dict[str, str]


class TagsEvent(OfRun):
    """Tags of a run."""

    kind: Literal["tags"] = "tags"
    tags: dict[str, str]


class InputsEvent(OfRun):
    """Data sets that a run read."""

    kind: Literal["inputs"] = "inputs"
    inputs: tuple[DataSet, ...]


class MetricsEvent(OfRun):
    """Points of a run's curves."""

    kind: Literal["metrics"] = "metrics"
    metrics: tuple[Point, ...]


class ArtifactEvent(OfRun, WithFile):
    """A file or folder of a run, below `folder` of its artifacts."""

    kind: Literal["artifact"] = "artifact"
    folder: str


class RegisterEvent(OfRun, WithFile):
    """A model folder that is to be registered; figures carry `time_ms`, so that asking again adds nothing."""

    kind: Literal["register"] = "register"
    request: Registration
    time_ms: int


class EndEvent(OfRun):
    """A run ends."""

    kind: Literal["end"] = "end"
    status: Status
    time_ms: int


class AttachEvent(OfVersion):
    """Figures of a version that were measured after it was registered."""

    kind: Literal["attach"] = "attach"
    metrics: Figures
    verdict: Judging | None
    time_ms: int

    @field_validator("verdict", mode="before")
    @classmethod
    def _without_nulls(cls, verdict: Any) -> Any:
        """Spools written before are full of nulls here where an evaluation had no verdict."""
        return None if isinstance(verdict, dict) and verdict.get("judge") is None else verdict


class EvidenceEvent(OfVersion, WithFile):
    """A file that is kept beside a version."""

    kind: Literal["evidence"] = "evidence"


class CandidatesEvent(OfRun):
    """Versions that a run proposes together: registered model -> outputs hash."""

    kind: Literal["candidates"] = "candidates"
    versions: dict[str, str]
    time_ms: int


Event = Annotated[
    RunEvent
    | ParamsEvent
    | TagsEvent
    | InputsEvent
    | MetricsEvent
    | ArtifactEvent
    | RegisterEvent
    | EndEvent
    | AttachEvent
    | EvidenceEvent
    | CandidatesEvent,
    Field(discriminator="kind"),
]


class Refusal(Document):
    """An event that the store would not take, and why."""

    reason: str
    event: Event


_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def read_event(line: str | bytes) -> Event:
    """The event of one line of a spool.

    Raises:
        ValueError: it is none.
    """
    return _EVENT.validate_python(json.loads(line))


def read_refusal(line: str | bytes) -> Refusal:
    """What one line of refused events says.

    Raises:
        ValueError: it is none.
    """
    return Refusal.model_validate(json.loads(line))


def as_line(document: Document) -> str:
    """An event or a refusal as one line, which ends in a newline. Curves may hold NaN, as Python writes it."""
    return json.dumps(document.model_dump(), separators=(",", ":"), sort_keys=True) + "\n"


def in_words(event: Event) -> str:
    """`registration of rlhf-sft`: what an event was to record."""
    match event:
        case RegisterEvent():
            return f"registration of {event.request.name}"
        case AttachEvent():
            return f"figures of {event.model}"
        case EvidenceEvent():
            return f"answers of {event.model}"
        case CandidatesEvent():
            return f"candidates {', '.join(event.versions)}"
        case RunEvent():
            return f"run {event.run}"
    return f"{event.kind} of {event.run}"
