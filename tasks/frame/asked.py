"""Asking DVC what has changed in a process of its own, so that this one can go on importing meanwhile."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rlhf_core.errors import ConfigError, EnvironmentProblem, RlhfError
from tasks.launch import tied

CODE = Path(__file__).resolve().parents[2]
ERRORS = {error.exit_code: error for error in (ConfigError, EnvironmentProblem)}


class ChangedStages:
    """The question which stages of a checkout have to run, on its way; a context manager that takes it back.

    Args:
        root: the checkout.
    """

    def __init__(self, root: Path) -> None:
        path = [str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            tied([sys.executable, "-P", "-m", "tasks.frame.asked", str(root)]),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def result(self) -> set[str]:
        """Wait for the answer: what `tasks.frame.changes.changed_stages` returns.

        Raises:
            ConfigError, EnvironmentProblem: as there.
            RuntimeError: the process did not come to its end; it has said why.
        """
        answer, _ = self._process.communicate()
        if self._process.returncode == 0:
            return set(json.loads(answer))
        error = ERRORS.get(self._process.returncode)
        if error is None or not answer:
            raise RuntimeError(f"asking DVC what has changed ended with exit code {self._process.returncode}")
        raise error(json.loads(answer))


def main(root: Path) -> int:
    """Print the names of the stages that have to run as JSON; where that cannot be told, why, and return its code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked is told too, and ends this
    from tasks.frame.changes import changed_stages

    out, sys.stdout = sys.stdout, sys.stderr  # nothing of a library's comes between
    try:
        print(json.dumps(sorted(changed_stages(root))), file=out, flush=True)
    except RlhfError as error:
        print(json.dumps(str(error)), file=out, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    from tasks.frame.leave import leave

    leave(lambda: main(Path(sys.argv[1])))
