"""`python -m tasks <stage>`: run one stage in the current folder. DVC calls this; see `dvc.yaml`."""

import importlib
import os
import sys
from pathlib import Path

from rlhf_core.errors import RlhfError
from tasks import paths
from tasks.params import load_params
from tasks.stage import run_stage
from tasks.watchdog import end_with_ancestors

STAGES = ("validate", "sft", "generate", "label", "preferences", "reward", "align", "evaluate", "report")


def main(arguments: list[str]) -> int:
    """Run the stage named by the only argument and return its exit code."""
    stage = arguments[0].partition("@")[0] if len(arguments) == 1 else ""
    if stage not in STAGES:
        print(
            f"usage: python -m tasks <stage>, where stage is one of {', '.join(STAGES)} (align@<algorithm>)",
            file=sys.stderr,
        )
        return 2
    end_with_ancestors(os.environ.get("RLHF_SUPERVISOR"))
    root = Path.cwd()
    try:
        params = load_params(root / paths.PARAMS)
        body = importlib.import_module(f"tasks.{stage}").run
        return run_stage(arguments[0], body, params, root)
    except RlhfError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
