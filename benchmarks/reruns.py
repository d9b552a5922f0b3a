"""How many stages the changes of the past would rerun today: `python -m benchmarks.reruns --until COMMIT`.

For each commit up to `--until` it takes the files of code that the commit touched, by the names that they have now,
and counts the stages that name one of them as an input, apart those that are new since; and the same with the
`dvc.yaml` of `--until` and the names of then. A file is followed through the renames of each commit since; one that
has no place any more reruns what it reran then. Reads git alone.
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
    """Where a commit's files are now, commit by commit: over all at once git takes much edited files for others."""
    places: dict[str, str] = {}
    for later in git("rev-list", "--reverse", f"{commit}..HEAD").split():
        lines = git(
            "diff-tree", "-r", "--no-commit-id", "--find-renames=40%", "-l0", "--diff-filter=R", "--name-status", later
        )
        renamed = {old: new for _, old, new in (line.split("\t") for line in lines.splitlines())}
        places = {old: renamed.get(place, place) for old, place in places.items()} | {
            old: new for old, new in renamed.items() if old not in places.values()
        }
    return places


def main() -> None:
    """Count over the history and print both sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", default="HEAD", help="last commit of the history that is replayed")
    options = parser.parse_args()
    moved, now = moves(options.until), inputs(Path("dvc.yaml").read_text())
    then = inputs(git("show", f"{options.until}:dvc.yaml"))
    here = set(git("ls-files").split())
    commits, before, after, new = 0, 0, 0, 0
    for commit in git("rev-list", options.until).split():
        touched = git("diff-tree", "--no-commit-id", "--name-only", "-r", "--root", commit).splitlines()
        code = [path for path in touched if path.endswith(".py") and path.startswith(CODE)]
        commits += bool(code)
        before += reruns(code, then)
        places = {path: moved.get(path, path) for path in code}
        gone = [path for path, place in places.items() if place not in here]
        hit = [
            name
            for name in now
            if reruns(places.values(), {name: now[name]}) or reruns(gone, {name: then.get(name, [])})
        ]
        after += sum(name in then for name in hit)
        new += sum(name not in then for name in hit)
    print(
        f"{commits} commits touched code: by the dvc.yaml of {options.until} {before} stages rerun, by this {after}, "
        f"and {new} of stages that are new"
    )


if __name__ == "__main__":
    main()
