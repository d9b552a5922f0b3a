"""How pytest-xdist deals files out to several workers; imported where there are any."""

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

SERVED = "tests/flows/"


class OneServer(LoadFileScheduling):
    """A file's tests go to one worker, and those of all files that share the Prefect server too."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # files keep their order, by default those with most tests come first
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return SERVED if file.startswith(SERVED) else file
