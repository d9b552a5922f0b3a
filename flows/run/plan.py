"""Which stage may start when: after those it reads from, side by side with those it does not depend on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self

from flows.run.execution import PipelineRun
from flows.run.summary import StageSummary
from tasks.frame.at_once import at_once
from tasks.frame.definition import stage_reads


class Plan:
    """The order of a run's stages while it goes on.

    Args:
        reads: of each stage, in the order of `dvc.yaml`, those that it reads from.
        limit: says how many may run at once; asked only while none runs, since those that run use what it counts.
        idle: stages with nothing to do and nothing to record. They wait for none and are not counted.
    """

    def __init__(
        self, reads: Mapping[str, Collection[str]], limit: Callable[[], int], idle: Collection[str] = ()
    ) -> None:
        self._reads, self._limit, self._idle = reads, limit, frozenset(idle)
        self._waiting = list(reads)
        self._done: set[str] = set()
        self._failed = False
        self._at_once = 1

    @classmethod
    def of(cls, run: PipelineRun) -> Self:
        """The plan of a run in its checkout."""
        names = [stage.name for stage in run.summary.stages if stage.name in run.chosen]
        idle = [name for name in names if run.passes_over(name)]
        return cls(stage_reads(run.root, names), lambda: at_once(run.prepared.params, run.root), idle)

    def startable(self, running: Collection[str]) -> Sequence[str]:
        """Stages to start now beside those that run; none once one has failed. They count as started."""
        if self._failed:
            return ()
        at_work = [name for name in running if name not in self._idle]
        idle = [name for name in self._waiting if name in self._idle]
        ready = [name for name in self._waiting if name not in idle and self._done.issuperset(self._reads[name])]
        if ready and not at_work:
            self._at_once = self._limit()
        chosen = idle + ready[: max(0, self._at_once - len(at_work))]
        self._waiting = [name for name in self._waiting if name not in chosen]
        return chosen

    def note_end(self, stage: StageSummary) -> None:
        """Take note of how a stage ended."""
        if stage.status in ("done", "unchanged"):
            self._done.add(stage.name)
        else:
            self._failed = True
