"""`rlhf models …`: thin words around `tasks/tracking` and `tasks/lineage/reproduce.py`."""

import json as json_format
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flows.cli.result import PLAIN_WIDTH
from flows.root import find_root
from flows.run.headlines import number
from rlhf_core.config.evaluation import JUDGE_ROWS
from tasks import paths
from tasks.params import load_params

LISTED_FIGURES = ("heldout_loss", "pairwise_accuracy", "spearman", "win_rate", "win_rate_low", "kl_to_sft")


def list_models(*, json: bool = False) -> int:
    """Registered versions with aliases and figures.

    Parameters
    ----------
    json:
        Print everything as JSON.
    """
    from tasks.tracking import list_versions

    versions = list_versions(find_root(Path.cwd()))
    if json:
        _print_json([plain(version) for version in versions])
        return 0
    table = _table("version", "aliases", "stage", "figures", "data", "commit")
    for version in versions:
        figures = [(key, version.metrics.get(key)) for key in LISTED_FIGURES]
        shown = " · ".join(f"{key} {number(value)}" for key, value in figures if value is not None)
        tags = version.tags
        data, commit = tags.get("data_hash", "")[:8], tags.get("git_commit", "")[:8]
        table.add_row(str(version), ", ".join(version.aliases), version.stage, shown, data, commit)
    _print_table(table if versions else "no version is registered yet; rlhf run makes some")
    return 0


def compare(a: str, b: str, /, *, json: bool = False) -> int:
    """What differs between two versions: data, parameters, figures, and an A/B on the same prompts.

    Parameters
    ----------
    a:
        name@alias or name/number, such as rlhf-policy@candidate.
    b:
        The other one.
    json:
        Print everything as JSON.
    """
    from tasks.tracking import compare_versions

    root = find_root(Path.cwd())
    settings = load_params(root / paths.PARAMS).evaluate
    found = compare_versions(root, a, b, judge=settings.judges[0], confidence=settings.confidence)
    if json:
        _print_json(plain(found))
        return 0
    first, second = str(found.a), str(found.b)
    _pairs("lineage", first, second, ((key, *pair) for key, pair in found.lineage.items()))
    _pairs("parameters", first, second, ((key, *pair) for key, pair in found.parameters.items()))
    if found.outputs:
        files = ", ".join(f"{stage} ({count} files)" for stage, count in found.outputs.items())
        _print_table(f"stages whose outputs differ: {files}")
    rows = ((key, _with_interval(entry, "a"), _with_interval(entry, "b")) for key, entry in found.metrics.items())
    _pairs("figures", first, second, rows)
    for entry in found.ab:
        _print_table(_ab_line(first, second, entry))
    if found.note:
        _print_table(f"no A/B: {found.note}")
    return 0


def promote(version: str = "rlhf-policy@candidate", /, *, reason: str = "", json: bool = False) -> int:
    """Make a version champion, if it passes the gates of params.yaml; exit code 3 and the figure if not.

    Parameters
    ----------
    version:
        name@alias or name/number.
    reason:
        Kept in the audit trail.
    json:
        Print what was done as JSON.
    """
    from tasks.tracking import promote as promote_version

    root = find_root(Path.cwd())
    done = promote_version(root, version, params=load_params(root / paths.PARAMS), reason=reason)
    if json:
        _print_json({**plain(done), "gates": [{**plain(gate), "passed": gate.passed} for gate in done.gates]})
        return 0
    for gate in done.gates:
        sign = "≥" if gate.at_least else "≤"
        figure = "undefined" if gate.figure is None else number(gate.figure)
        print(f"passed  {gate.name}: {figure} {sign} {number(gate.limit)}  {gate.detail}")
    print(f"{done.model}/{done.champion} is champion{_instead(done.model, done.champion_before)}")
    return 0


def rollback(model: str = "rlhf-policy", /, *, reason: str = "", json: bool = False) -> int:
    """Give `champion` back to the version before.

    Parameters
    ----------
    model:
        Registered model.
    reason:
        Kept in the audit trail.
    json:
        Print what was done as JSON.
    """
    from tasks.tracking import rollback as roll_back

    done = roll_back(find_root(Path.cwd()), model, reason=reason)
    if json:
        _print_json(plain(done))
    elif done.champion is None:
        print(f"{done.model} has no champion any more{_instead(done.model, done.champion_before)}")
    else:
        print(f"{done.model}/{done.champion} is champion again{_instead(done.model, done.champion_before)}")
    return 0


def reproduce(version: str = "rlhf-policy@champion", /, *, json: bool = False) -> int:
    """Rebuild a version from its manifest in a clean worktree and compare byte for byte.

    Parameters
    ----------
    version:
        name@alias or name/number.
    json:
        Print what was found as JSON.
    """
    from tasks.lineage.reproduce import reproduce as rebuild
    from tasks.tracking import read_manifest

    root = find_root(Path.cwd())
    named, manifest = read_manifest(root, version)
    found = rebuild(root, str(named), manifest, on_line=lambda line: print(line, file=sys.stderr))
    if json:
        _print_json(plain(found))
    else:
        print(found)
    return 0 if found.identical else 3


def plain(value: Any) -> Any:
    """A JSON-able form of dataclasses, paths, tuples and undefined numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _instead(model: str, before: int | None) -> str:
    return f", in the place of {model}/{before}" if before is not None else ""


def _with_interval(entry: Mapping[str, Any], side: str) -> str:
    value, interval = entry[side], entry[f"{side}_interval"]
    text = "–" if value is None else number(value)
    return text if interval is None else f"{text} [{number(interval[0])}, {number(interval[1])}]"


def _ab_line(a: str, b: str, entry: Mapping[str, Any]) -> str:
    simulated = " (simulated)" if JUDGE_ROWS[entry["judge"]].simulated else ""
    low, high = entry["win_rate_low"], entry["win_rate_high"]
    interval = "(too few prompts for an interval)" if low is None else f"[{low:.3f}, {high:.3f}]"
    return (
        f"A/B by {entry['judge']}{simulated} at temperature {entry['temperature']:g} on {entry['num_prompts']} "
        f"prompts: {a} against {b}: win rate {entry['win_rate']:.3f} {interval}, p = {entry['p_value']:.2g}"
    )


def _pairs(title: str, a: str, b: str, rows: Iterable[tuple[str, Any, Any]]) -> None:
    listed = [(key, *("–" if value is None else str(value) for value in values)) for key, *values in rows]
    if not listed:
        _print_table(f"{title}: the same")
        return
    table = _table(title, a, b)
    for row in listed:
        table.add_row(*row)
    _print_table(table)


def _table(*titles: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _print_table(content: Table | str) -> None:
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(content)


def _print_json(value: Any) -> None:
    print(json_format.dumps(value, indent=2, sort_keys=True, allow_nan=False))
