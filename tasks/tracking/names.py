"""The names that the registry, the recorder and the gates share: models, aliases, tags, a version's plain form."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_core.errors import ConfigError
from tasks.catalogue import CATALOGUE, MODEL_NAMES

EXPERIMENT = "rlhf"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
SFT_MODEL, SCORING_MODEL, POLICY_MODEL = (  # registered models by what they are in the comparison
    next(row.registers for row in CATALOGUE if row.role == role) for role in ("base", "judge", "policy")
)

RUN_KEY = "rlhf.run_key"
PARAMS_CHANGED = "params_changed"
OUTPUTS_HASH = "outputs_hash"
STAGE = "stage"
UNDEFINED = "undefined"
CANDIDATE_TIME = "candidate_time_ms"
RESPONSES = "responses.parquet"
MANIFEST = "artifacts/lineage/manifest.json"  # within the logged model
WEIGHTS = "artifacts/model"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """One version in the registry.

    Attributes:
        name: registered model, one of `MODEL_NAMES`.
        version: counts from 1 within the name.
        stage: the stage that made it, `align@ppo`.
        outputs_hash: identity of the content: digest of the stage name and of every file of the model folder.
        aliases: `candidate`, `champion`, `previous`, as they stand now.
        metrics: headline figures; None where a figure is undefined.
        tags: what it came from in short, see `mlflow/registry.yaml`; the whole lineage is its manifest.
        run_id: the MLflow run of the stage that made it.
        created: seconds since 1970.
    """

    name: str
    version: int
    stage: str
    outputs_hash: str
    aliases: tuple[str, ...]
    metrics: Mapping[str, float | None]
    tags: Mapping[str, str]
    run_id: str
    created: float

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def parse_reference(reference: str) -> tuple[str, str | int]:
    """Split `rlhf-policy@candidate` into name and alias, `rlhf-policy/3` into name and number.

    Raises:
        ConfigError: it is neither form, or the model name is unknown.
    """
    name, separator, rest = reference.partition("@") if "@" in reference else reference.partition("/")
    if name not in MODEL_NAMES or not rest or (separator == "/" and not rest.isdecimal()):
        raise ConfigError(
            f"{reference!r}: no model version. Fix: write name@alias or name/number, "
            f"such as rlhf-policy@candidate or rlhf-policy/3; names are {', '.join(MODEL_NAMES)}"
        )
    return name, int(rest) if separator == "/" else rest


def evidence_folder(version: ModelVersion) -> str:
    """Folder among the run's artifacts that holds what a version was judged by."""
    return f"evaluation/{version.outputs_hash[:16]}"
