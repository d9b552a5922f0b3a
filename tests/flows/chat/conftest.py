"""One folder of tiny models for all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.served import load, write_models

from rlhf_core.serving.served import Served
from tests.conftest import made_once


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "served", write_models)


@pytest.fixture(scope="module")
def models(model_folders: Path) -> Iterator[dict[str, Served]]:
    models = load(model_folders, "policy", "plain")
    for model in models.values():
        model.eos_ids = ()  # answers of a tiny model would be empty now and then
    yield models
    for model in models.values():
        model.close()
