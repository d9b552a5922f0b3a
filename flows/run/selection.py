"""Part of a pipeline: `--from` and `--until`, and what of it would run."""

from collections.abc import Collection, Mapping
from pathlib import Path

from rlhf_core.errors import ConfigError
from tasks.frame.definition import stage_reads


def chosen_stages(
    root: Path, stages: Collection[str], *, first: str | None, last: str | None, changed: Collection[str]
) -> frozenset[str]:
    """The stages that a run is to bring up to date.

    Args:
        root: checkout with `dvc.yaml`.
        stages: all of its stages.
        first: this stage and whatever reads from it, directly or not; None takes all. `align` means all `align@…`.
        last: this stage and whatever it reads from, directly or not; None takes all.
        changed: stages that are not up to date.

    Raises:
        ConfigError: there is no such stage, nothing lies between the two, or a stage that is left out at the beginning
            is not up to date, so that what follows would be made from something else than it says.
    """
    reads = stage_reads(root, tuple(stages))
    after = _reached(_named(stages, first, "--from"), _turned(reads)) if first else set(stages)
    before = _reached(_named(stages, last, "--until"), reads) if last else set(stages)
    chosen = after & before
    if not chosen:
        raise ConfigError(
            f"--from {first} --until {last}: nothing lies between them. Fix: name them the other way round"
        )
    stale = sorted((_reached(chosen, reads) - chosen) & set(changed), key=list(stages).index)
    if stale:
        raise ConfigError(
            f"--from {first}: {stale[0]}, which it is made from, is not up to date. "
            f"Fix: --from {stale[0]}, or leave --from out"
        )
    return frozenset(chosen)


def _named(stages: Collection[str], given: str, option: str) -> set[str]:
    found = {stage for stage in stages if given in (stage, stage.partition("@")[0])}
    if not found:
        raise ConfigError(f"{option} {given}: no such stage. Fix: one of {', '.join(stages)}")
    return found


def _turned(reads: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """Of each stage, those that read from it."""
    return {stage: {other for other, its in reads.items() if stage in its} for stage in reads}


def _reached(start: Collection[str], edges: Mapping[str, Collection[str]]) -> set[str]:
    reached, waiting = set(start), list(start)
    while waiting:
        more = set(edges[waiting.pop()]) - reached
        reached |= more
        waiting += more
    return reached
