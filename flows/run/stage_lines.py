"""What a stage's log holds: the stage's own lines, and not DVC's about its files and what to type next."""

import re
from collections.abc import Callable

# From dvc 3.67: dvc/commands/repro.py, dvc/stage/run.py, dvc/repo/scm_context.py and dvc/ui.
DVC_BEGINS = re.compile(r"Running stage '.*':")  # the next line is the command
DVC_SAYS = re.compile(
    r"(Stage )?'.*' didn't change, skipping|(Generating|Updating) lock file '.*'|Data and pipelines are up to date\."
    r"|To track the changes with git, run:|\s*git add .*|To enable auto staging, run:|\s*dvc config core.autostage true"
    r"|Use `dvc push` to send your updates to remote storage\."
)


def own_lines(on_line: Callable[[str], None]) -> Callable[[str], None]:
    """Pass on what is not DVC's, without empty lines at the start, at the end, and one after the other."""
    said, gap, begins = False, False, False

    def take(line: str) -> None:
        nonlocal said, gap, begins
        command, begins = begins and line.startswith("> "), bool(DVC_BEGINS.fullmatch(line))
        if command or begins or DVC_SAYS.fullmatch(line):
            return
        if not line.strip():
            gap = said
            return
        if gap:
            on_line("")
        said, gap = True, False
        on_line(line)

    return take
