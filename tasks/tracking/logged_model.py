"""A model folder as an MLflow model that loads anywhere: code, weights, lineage, requirements, signature, example.

Written by MLflow's client calls alone, without the process-wide current run, so that it works in any thread; and
without loading the weights, so that the process which records needs no torch.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config import ModelConfig
from rlhf_core.state.atomic import write_json
from tasks.lineage.manifest import flat_params
from tasks.tracking.events import Registration
from tasks.tracking.fitting import fitted
from tasks.tracking.names import OUTPUTS_HASH, SCORING_MODEL
from tasks.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.models import Model
    from mlflow.types import ParamSpec

HERE = Path(__file__).parent
CODE = HERE.parents[1] / "rlhf_core"
LONGEST_PARAM = 500
MODELS_A_PAGE = 100
REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "pydantic", "numpy")


def log(store: Store, run_id: str, request: Registration, folder: Path) -> str:
    """Log a model folder to a run and return the id of the logged model; one with the same content is used again.

    What the model can do goes by its name; its lineage is `lineage/manifest.json` among its artifacts.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    standing = store.client.search_logged_models(
        [store.experiment_id], filter_string=f"tags.{OUTPUTS_HASH} = '{request.content}' AND status = 'READY'"
    )
    if standing:
        return standing[0].model_id
    logged = store.client.create_logged_model(
        store.experiment_id,
        name=request.name,
        source_run_id=run_id,
        tags={OUTPUTS_HASH: request.content},
        params={key: fitted(value, LONGEST_PARAM) for key, value in request.params.items()},
        model_type="pyfunc",
    )
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "model"
        described = Model(
            artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id, model_uuid=logged.model_id
        )
        save(described, local, request, folder, Path(scratch))
        store.client.log_model_artifacts(logged.model_id, str(local))
    store.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    store.client.finalize_logged_model(logged.model_id, "READY")
    return logged.model_id


def save(described: "Model", local: Path, request: Registration, folder: Path, scratch: Path) -> None:
    """Write the MLflow model folder `local`."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.models.signature import ModelSignature
    from mlflow.models.utils import _Example
    from mlflow.types import ColSpec, DataType, ParamSchema, Schema

    scores = request.name == SCORING_MODEL
    limits = token_limits(request.manifest)
    write_json(scratch / "lineage" / "manifest.json", request.manifest)
    warnings.filterwarnings("ignore", ".*An input example was not provided")  # it is, below
    pyfunc.save_model(
        str(local),
        mlflow_model=described,
        python_model=str(HERE / ("pyfunc_reward.py" if scores else "pyfunc_policy.py")),
        artifacts={"model": str(folder), "lineage": str(scratch / "lineage")},
        code_paths=[str(CODE)],
        pip_requirements=requirements(),
        model_config=limits,
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string, column) for column in request.example]),
            outputs=Schema([ColSpec(DataType.double if scores else DataType.string)]),
            params=None if scores else ParamSchema(_sampling_params(limits["max_response_tokens"])),
        ),
    )
    for bytecode in local.rglob("__pycache__"):
        shutil.rmtree(bytecode)
    # Handing the example to save_model would load the weights and run them here; its file and entry are all that is
    # wanted, and MLflow has no public call for that.
    saved = _Example(pd.DataFrame([request.example]))
    saved.save(str(local))
    described.saved_input_example_info = saved.info
    described.save(str(local / MLMODEL_FILE_NAME))


def log_metrics(store: Store, run_id: str, model_id: str, metrics: Mapping[str, float | None], time_ms: int) -> None:
    """Show figures on the logged model and on its run; undefined ones cannot be shown."""
    from mlflow.entities import Metric

    rows = [Metric(key, value, time_ms, 0, model_id=model_id) for key, value in metrics.items() if value is not None]
    if rows:
        store.client.log_batch(run_id, metrics=rows)


def figures_of(store: Store, model_ids: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The newest value of every figure of logged models, by model; of one that was deleted in MLflow there are none."""
    from mlflow.exceptions import MlflowException

    if len(model_ids) == 1:
        try:
            return {model_ids[0]: _newest(store.client.get_logged_model(model_ids[0]).metrics)}
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
    found: dict[str, dict[str, float | None]] = {}
    token = None
    while model_ids:
        page = store.client.search_logged_models(
            [store.experiment_id], max_results=MODELS_A_PAGE, page_token=token or None
        )
        found |= {model.model_id: _newest(model.metrics) for model in page}
        token = page.token
        if not token:
            break
    return found


def link_version(store: Store, model_id: str, name: str, version: int) -> None:
    """Let the logged model's page say as what it is registered, as `mlflow.register_model` does."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    standing = json.loads(store.client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    own = {"name": name, "version": version}
    if own not in standing:
        store.client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*standing, own])})


def _newest(metrics: "Sequence[Metric] | None") -> dict[str, float | None]:
    return {one.key: one.value for one in sorted(metrics or (), key=lambda one: one.timestamp)}


def model_id(version: "MlflowVersion") -> str:
    """Logged model behind a version. SQLite stores do not fill the field, but the source address has it."""
    return version.model_id or version.source.removeprefix("models:/").partition("/")[0]


def requirements() -> list[str]:
    """What an environment needs to load the model, at the versions that made it; local builds such as +cpu dropped."""
    return [f"{name}=={installed(name).partition('+')[0]}" for name in REQUIREMENTS]


def token_limits(manifest: Mapping[str, Any]) -> dict[str, int]:
    """`max_prompt_tokens` and `max_response_tokens` of the model's training: it reads texts cut the same way."""
    params = flat_params(manifest["params"])
    names = ("max_prompt_tokens", "max_response_tokens")
    return {name: params.get(f"model.{name}", ModelConfig.model_fields[name].default) for name in names}


def _sampling_params(max_new_tokens: int) -> "list[ParamSpec]":
    from mlflow.types import DataType, ParamSpec

    return [
        ParamSpec("temperature", DataType.double, 0.0),
        ParamSpec("max_new_tokens", DataType.long, max_new_tokens),
        ParamSpec("seed", DataType.long, 0),
    ]
