"""`python -m tasks.planning ROOT [stages that are not up to date]`: count the rows and tokens of a checkout."""

import sys
from pathlib import Path

from rlhf_core.errors import RlhfError
from tasks import paths
from tasks.params import load_params


def main(root: Path, stale: list[str]) -> int:
    """Print a `Workload` as JSON; where there is none, why, and return that error's code."""
    from tasks.planning.counting import count

    out, sys.stdout = sys.stdout, sys.stderr  # nothing of a library's comes between
    try:
        found = count(root, load_params(root / paths.PARAMS), stale)
    except RlhfError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(found.model_dump_json(), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
