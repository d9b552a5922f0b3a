"""`python3 -m tasks <stage>`: run one stage in the current folder. DVC calls this; see `dvc.yaml`.

DVC starts a command by the name on PATH, which is another Python where `.venv/bin/dvc` was called without
activating the environment. A Python that lacks the project's libraries hands over to the environment's own.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from tasks.catalogue import STAGES


def main(arguments: list[str]) -> int:
    """Run the stage named by the only argument and return its exit code."""
    stage = arguments[0].partition("@")[0] if len(arguments) == 1 else ""
    if stage not in STAGES:
        stages = ", ".join(STAGES)
        print(f"usage: python3 -m tasks <stage>, where stage is one of {stages} (align@<algorithm>)", file=sys.stderr)
        return 2
    if find_spec("torch") is None:
        return _hand_over(arguments)
    return _run(arguments[0], stage)


def _hand_over(arguments: list[str]) -> int:
    """Become the nearest `.venv/bin/python` at or above the current folder; a run's worktree lies below its home."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        interpreter = folder / ".venv/bin/python"
        if interpreter.is_file() and Path(sys.prefix) != folder / ".venv":
            os.execv(interpreter, [str(interpreter), "-m", "tasks", *arguments])  # noqa: S606 - a path of our own
    print(f"{sys.executable}: torch is not installed here. Fix: make env, or activate the environment", file=sys.stderr)
    return 7


def _run(name: str, module: str) -> int:
    from tasks.frame.watchdog import end_with_ancestors
    from tasks.libraries import set_library_environment

    end_with_ancestors(os.environ)  # first of all: whoever started this may be gone before the imports are done
    set_library_environment()
    import importlib

    from rlhf_core.errors import RlhfError
    from tasks import paths
    from tasks.frame.process import run_stage
    from tasks.frame.several import only_watches, run_in_processes, wants_processes
    from tasks.params import load_params

    root = Path.cwd()
    try:
        params = load_params(root / paths.PARAMS)
        if only_watches(name):
            return 0
        if wants_processes(name, params):
            return run_in_processes(name, params, root)
        body = importlib.import_module(f"tasks.stages.{module}.run").run
        return run_stage(name, body, params, root)
    except RlhfError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    from tasks.frame.leave import leave

    leave(lambda: main(sys.argv[1:]))
