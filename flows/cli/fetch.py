"""`rlhf models fetch` and `rlhf data fetch`: what others have published, with a note of where it came from."""

import json as json_format
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from flows.root import find_root
from rlhf_core.data.reading.kinds import Kind
from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import temporary_folder
from tasks import paths
from tasks.fetching.install import MODELS, already_there, check_room, install
from tasks.fetching.plan import FetchPlan, folder_plan, plan_fetch
from tasks.fetching.source import Source, check_name, parse_source
from tasks.lineage.provenance import write_file_note


def fetch(source: str, name: str, /, *, dry_run: bool = False, json: bool = False) -> int:
    """Bring a pretrained model under models/NAME, with a note of where it came from.

    Only safetensors and the files of configuration and tokenizer are read, no code. What stands there afterwards is
    whole and checked; fetched again, it is left as it is. Then: rlhf run --profile local-model --set
    model.path=models/NAME.

    Parameters
    ----------
    source:
        hub:ORG/NAME@REVISION, pinned to the commit that the revision stands for now; a .gguf file, which is
        dequantised; a folder; or a registered version such as rlhf-policy@champion.
    name:
        Of the folder below models/.
    dry_run:
        Say what would be fetched, its size and its licence, and fetch nothing.
    json:
        Print the note as JSON.
    """
    asked, home = parse_source(source), paths.home(find_root(Path.cwd()))
    check_name(name)
    with ExitStack() as stack:
        plan = _version_plan(home, asked, stack) if asked.kind == "version" else plan_fetch(asked)
        print(plan.line(), file=sys.stderr)
        if dry_run:
            return 0
        note = already_there(home, name, plan.source, plan.commit)
        if note is not None:
            print(f"{MODELS / name}: there already, as it was fetched", file=sys.stderr)
        else:
            check_room(home, plan.bytes)
            note = install(home, name, plan.source, plan.commit, plan.fill)
    print(json_format.dumps(asdict(note), indent=2, sort_keys=True) if json else MODELS / name)
    return 0


def fetch_data(
    source: str,
    file: Path,
    /,
    *,
    split: str,
    kind: Kind,
    config: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> int:
    """Bring one split of a data set from a hub into a file, with a note of where it came from.

    Its rows stay as they are; how many of them can be read as the kind is said, and none is an error (exit code 4).
    Then: rlhf run --data KIND=FILE.

    Parameters
    ----------
    source:
        hub:ORG/NAME@REVISION, pinned to the commit that the revision stands for now.
    file:
        To be written: .parquet, .jsonl or .jsonl.gz.
    split:
        As the data set names it, such as train, or train[:1000].
    kind:
        What its rows are to be, such as comparisons.
    config:
        Configuration of a data set that has several.
    dry_run:
        Say which commit and licence, and fetch nothing.
    json:
        Print the note as JSON.
    """
    from tasks.fetching.dataset import as_note, check_file, fit, look_up, write_rows

    asked = parse_source(source)
    if asked.kind != "hub":
        raise ConfigError(f"{source}: no data set of a hub. Fix: hub:ORG/NAME@REVISION; files are given to rlhf run")
    check_file(file)
    found = look_up(asked)
    print(f"{asked}: {found.commit[:12]}, licence {found.licence}", file=sys.stderr)
    if dry_run:
        return 0
    with temporary_folder(file.absolute().parent, f".{file.name}") as scratch:
        written = scratch / file.name
        write_rows(found, split, config, written)
        fitting = fit(written, kind)
        more = as_note(found, split, config, kind, fitting)
        note = write_file_note(file, written, source=str(asked), commit=found.commit, licence=found.licence, **more)
        written.replace(file)
    for problem, count in list(fitting.problems.items())[:5]:
        print(f"{count} of {fitting.rows} rows cannot be read as {kind}: {problem}", file=sys.stderr)
    print(json_format.dumps(note, indent=2, sort_keys=True) if json else file)
    return 0


def _version_plan(home: Path, asked: Source, stack: ExitStack) -> FetchPlan:
    """A registered version: its model folder is brought here first, since a store cannot be looked into."""
    from tasks.tracking import download_version, resolve_version

    version = resolve_version(home, asked.name)
    scratch = stack.enter_context(temporary_folder(home / paths.STATE / "staging", "fetch"))
    folder = download_version(home, version, "artifacts/model", scratch)
    return folder_plan(Source(kind="version", name=str(version)), folder, commit=version.outputs_hash)
