"""How many stages the changes of the past would rerun by today's `dvc.yaml`: `python -m benchmarks.reruns`.

For each commit up to `--until` it takes the files of code that the commit touched, by the names that git finds
they have now, and counts the stages that name one of them as an input; and the same with the
`dvc.yaml` of `--until` and the names of then. Reads git alone.
"""

import argparse
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from ruamel.yaml import YAML

CODE = ("rlhf_core/", "tasks/")


def git(*arguments: str) -> str:
    """What a git command prints."""
    return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True).stdout


def inputs(text: str) -> dict[str, list[str]]:
    """The code that each stage of a `dvc.yaml` names."""
    stages = YAML(typ="safe").load(text)["stages"]
    return {name: [dep for dep in body["deps"] if dep.startswith(CODE)] for name, body in stages.items()}


def reruns(touched: Collection[str], stages: Mapping[str, list[str]]) -> int:
    """How many stages have one of these files among their inputs."""
    hits = (
        any(path == dep or path.startswith(f"{dep}/") for path in touched for dep in deps) for deps in stages.values()
    )
    return sum(hits)


def moves(commit: str) -> dict[str, str]:
    """Where the files of a commit are now, as git follows their content."""
    lines = git("diff", "--name-status", "--find-renames=50%", "-l0", "--diff-filter=R", commit, "HEAD").splitlines()
    return {old: new for _, old, new in (line.split("\t") for line in lines)}


def main() -> None:
    """Count over the history and print both sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", default="HEAD", help="last commit of the history that is replayed")
    options = parser.parse_args()
    moved, now = moves(options.until), inputs(Path("dvc.yaml").read_text())
    then = inputs(git("show", f"{options.until}:dvc.yaml"))
    commits, before, after = 0, 0, 0
    for commit in git("rev-list", options.until).split():
        touched = git("diff-tree", "--no-commit-id", "--name-only", "-r", "--root", commit).splitlines()
        code = [path for path in touched if path.endswith(".py") and path.startswith(CODE)]
        commits += bool(code)
        before += reruns(code, then)
        after += reruns([moved.get(path, path) for path in code], now)
    print(
        f"{commits} commits touched code: by the dvc.yaml of {options.until} {before} stages rerun, by this one {after}"
    )


if __name__ == "__main__":
    main()
