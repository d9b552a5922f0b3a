"""A thread that samples as long as somebody waits for a response."""

import threading

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.serving.continuous import ContinuousSampler, Listener, Request, Row


class SamplingThread:
    """A `ContinuousSampler` at work beside whatever else the process does.

    Args:
        sampler: used by this thread alone from now on.
    """

    def __init__(self, sampler: ContinuousSampler) -> None:
        self._sampler = sampler
        self._wake = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="sampling", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Row:
        """Let a request wait for its turn; the listener hears of it in the thread that samples.

        Raises:
            EnvironmentProblem: the thread is closed.
        """
        with self._wake:
            if self._is_closed:
                raise EnvironmentProblem(CLOSING)
            row = self._sampler.submit(request, listener)
            self._wake.notify()
        return row

    @property
    def load(self) -> tuple[int, int]:
        """How many rows are under way, and how many wait."""
        return len(self._sampler.rows), len(self._sampler.waiting)

    def close(self) -> None:
        """Take no more requests, fail those that are not done, and end."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                while self._sampler.is_idle and not self._is_closed:
                    self._wake.wait()
                if self._is_closed:
                    break
            self._sampler.step()
        self._sampler.fail_all(EnvironmentProblem(CLOSING), waiting=True)


CLOSING = "the server is going down. Fix: ask again when it is back"
