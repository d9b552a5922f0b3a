"""One folder of tiny models for all, and a server of them for each file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.served import load, serving, write_models

from rlhf_core.serving.served import Served
from tests.conftest import made_once


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "served", write_models)


@pytest.fixture(scope="module")
def models(model_folders: Path) -> dict[str, Served]:
    return load(model_folders, "policy", "plain", "reward")


@pytest.fixture(scope="module")
def address(models: dict[str, Served]) -> Iterator[str]:
    with serving(models) as address:
        yield address
