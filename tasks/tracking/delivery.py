"""Taking events from the spool to the store, each once, whatever dies in between.

A position is noted after the store has taken an event, so a kill in between sends that event a second time. Every
kind of event is therefore such that the store ends the same: runs are found by key before they are made, a metric
with equal time, step and value is one row in MLflow, tags and files are overwritten with themselves, and a model
version is found by its content before it is registered.

An event that the store would not take is set aside with the reason, so that the rest goes on, and is offered again by
every `flush`. Nothing is given up.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.faults import faultpoint
from tasks import paths
from tasks.tracking.events import Event, MetricsEvent, Refusal, WithFile, in_words
from tasks.tracking.sender import METRICS_A_BATCH, Sender, would_not_be_taken
from tasks.tracking.spool import Spool, spools
from tasks.tracking.store import first_line, lock, open_store

SENDER_PATIENCE_S = 5.0
KEEP_SENT_DAYS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """What became of recorded events.

    Attributes:
        sent: events that the store took now.
        pending: events that still wait.
        refused: events that the store would not take, each in words with the reason; set aside in
            `.rlhf/spool/<run>.refused` and offered again by `flush`.
        cut: names of values that were longer than MLflow takes and went there cut.
        problem: why events wait, in one line; None when none does.
    """

    sent: int = 0
    pending: int = 0
    refused: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    problem: str | None = None

    def __add__(self, other: "Delivery") -> "Delivery":
        return Delivery(
            sent=self.sent + other.sent,
            pending=self.pending + other.pending,
            refused=self.refused + other.refused,
            cut=tuple(dict.fromkeys(self.cut + other.cut)),
            problem=self.problem or other.problem,
        )

    def __str__(self) -> str:
        """What is not recorded, why, and the cure; empty when everything is."""
        said = []
        if self.pending:
            why = f" ({self.problem})" if self.problem else ""
            cure = "; then rlhf sync" if "Fix: " in why else ". Fix: rlhf sync"
            said.append(f"{self.pending} records wait to be sent{why}{cure}")
        if self.refused:
            said.append(
                f"{len(self.refused)} records were not taken: {'; '.join(self.refused)}. They are kept. "
                "Fix: mend what is named, then rlhf sync"
            )
        if self.cut:
            said.append(f"too long for MLflow and cut there: {', '.join(self.cut)}")
        return "; ".join(said)


def pending(root: Path) -> int:
    """Number of recorded events that the store has not taken yet. Cheap: opens no store."""
    return sum(spool.pending() + spool.set_aside() for spool in spools(paths.home(root)))


def flush(root: Path) -> Delivery:
    """Send everything that waits or was refused, oldest run first; safe to repeat and to run beside a recorder.

    The store being away is no error here: the delivery says so and the events wait on.
    """
    home = paths.home(root)
    waiting = [spool for spool in spools(home) if spool.pending() or spool.set_aside()]
    total = Delivery()
    if waiting:
        try:
            store = open_store(root)
        except EnvironmentProblem as error:
            return Delivery(pending=pending(root), problem=str(error))
        for spool in waiting:
            sender = Sender(store, spool)
            total += offer_again(sender) + deliver(sender)
    _remove_old(home)
    return total


def deliver(sender: Sender) -> Delivery:
    """Send what waits in one spool, up to the first event that cannot be sent now."""
    spool, total = sender.spool, Delivery()
    try:
        with lock(sender.store.home, f"spool-{spool.run_key}", patience_s=SENDER_PATIENCE_S):
            for position, events in _batches(spool):
                sent = _hand_over(sender, events)
                total += sent
                if sent.problem:
                    return total + Delivery(pending=spool.pending())
                faultpoint("delivery.sent")
                spool.advance(position)
                if not sent.refused:
                    _drop_files(spool, events)
    except EnvironmentProblem as error:
        return total + Delivery(pending=spool.pending(), problem=str(error))
    return total


def offer_again(sender: Sender) -> Delivery:
    """Send what was refused before, and keep what still is."""
    spool, total = sender.spool, Delivery()
    if not spool.set_aside():
        return total
    try:
        with lock(sender.store.home, f"spool-{spool.run_key}", patience_s=SENDER_PATIENCE_S):
            kept = []
            for refusal in spool.refusals():
                sent = _send(sender, [refusal.event])
                total += sent
                if sent.refused or sent.problem:
                    kept.append(Refusal(reason=(sent.refused or (refusal.reason,))[0], event=refusal.event))
                    total += Delivery(pending=int(sent.problem is not None))
                else:
                    _drop_files(spool, [refusal.event])
            spool.keep_refused(kept)
    except EnvironmentProblem as error:
        return total + Delivery(pending=spool.set_aside(), problem=str(error))
    return total


def _hand_over(sender: Sender, events: Sequence[Event]) -> Delivery:
    """Send events of one kind together; where one of them is at fault, one by one, setting that one aside."""
    sent = _send(sender, events)
    if not sent.refused:
        return sent
    if len(events) == 1:
        sender.spool.refuse(events[0], sent.refused[0])
        return sent
    return sum((_hand_over(sender, [event]) for event in events), Delivery())


def _send(sender: Sender, events: Sequence[Event]) -> Delivery:
    try:
        sender.send(events)
    except Exception as error:  # every library between here and a database has its own kinds
        obstacle = sender.obstacle(events[0])
        if obstacle is not None or not would_not_be_taken(error):
            return Delivery(problem=obstacle or first_line(error))
        return Delivery(refused=(f"{in_words(events[0])}: {first_line(error)}",))
    return Delivery(sent=len(events), cut=sender.take_cut())


def _drop_files(spool: Spool, events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, WithFile):
            spool.drop(event.kept)


def _batches(spool: Spool) -> Iterator[tuple[int, list[Event]]]:
    """Group waiting events: metrics of one run that follow each other go together, anything else alone."""
    batch: list[Event] = []
    end, size = spool.position, 0
    try:
        for position, event in spool.events(end):
            rows = len(event.metrics) if isinstance(event, MetricsEvent) else METRICS_A_BATCH
            if batch and not (_go_together(batch[0], event) and size + rows <= METRICS_A_BATCH):
                yield end, batch
                batch, size = [], 0
            batch.append(event)
            end, size = position, size + rows
    except EnvironmentProblem:  # of a line that cannot be read; what stands before it can be sent
        if batch:
            yield end, batch
        raise
    if batch:
        yield end, batch


def _go_together(one: Event, other: Event) -> bool:
    return isinstance(one, MetricsEvent) and isinstance(other, MetricsEvent) and one.run == other.run


def _remove_old(home: Path) -> None:
    oldest = time.time() - KEEP_SENT_DAYS * 86_400
    for spool in spools(home):
        if spool.path.stat().st_mtime < oldest and not spool.pending() and not spool.set_aside():
            spool.remove()
