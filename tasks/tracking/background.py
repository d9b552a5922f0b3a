"""The thread that takes a recorder's events to the store while the run goes on."""

import threading
from dataclasses import replace
from pathlib import Path

from tasks.tracking.delivery import Delivery, deliver
from tasks.tracking.sender import Sender
from tasks.tracking.spool import Spool
from tasks.tracking.store import first_line, open_store

GATHER_S = 0.5  # a moment's delay lets many events go in one request
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)


class BackgroundSender:
    """Sends what a spool gains, again and again while the store is away. Opens the store by itself.

    Attributes:
        sender: None until the store was opened.
        sent: what the store took and refused so far, and the last problem.
    """

    def __init__(self, root: Path, spool: Spool) -> None:
        self.sender: Sender | None = None
        self.sent = Delivery()
        self._root, self._spool = root, spool
        self._changed = threading.Condition()
        self._new = True
        self._asked = self._answered = 0  # numbers of the attempts that `drain` wants and has got
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mlflow-recorder", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that the spool has gained something."""
        with self._changed:
            self._new = True
            self._changed.notify_all()

    def drain(self, patience_s: float) -> None:
        """Wait for one attempt that begins after now to send everything, or for `patience_s` seconds."""
        with self._changed:
            self._asked += 1
            wanted = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._answered >= wanted, patience_s)

    def stop(self, patience_s: float) -> Delivery:
        """Make a last attempt, end the thread, and say what was sent and what waits."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(patience_s)
        with self._changed:
            waiting = self._spool.pending()
            problem = self.sent.problem or f"still sending after {patience_s:.0f} s"
            return replace(self.sent, pending=waiting, problem=problem if waiting else None)

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._urgent())
                pause = RETRY_S[min(failures, len(RETRY_S)) - 1] if failures else GATHER_S
                self._changed.wait_for(self._urgent, timeout=pause)
                asked, stopping, self._new = self._asked, self._stopping, False
            now = self._attempt()
            failures = failures + 1 if now.problem else 0
            with self._changed:
                self.sent = replace(self.sent + now, problem=now.problem)
                self._answered = asked
                self._new = self._new or now.problem is not None
                self._changed.notify_all()
            if stopping:
                return

    def _urgent(self) -> bool:
        return self._stopping or self._asked > self._answered

    def _attempt(self) -> Delivery:
        try:
            if self.sender is None:
                self.sender = Sender(open_store(self._root), self._spool)
            elif self.sent.problem:  # it may be another store by now, or another experiment in it
                self.sender.store = open_store(self._root)
            return deliver(self.sender)
        except Exception as error:  # a run goes on whatever becomes of its record
            return Delivery(problem=first_line(error))
