"""Parts of a stage that are independent of each other, side by side in processes forked before any of them begins.

A fork is safe while nothing has been computed: no thread of a library runs yet. So the processes are forked at once,
and each waits for its turn. Each dies with the stage's process, whatever ends that.
"""

import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, TypeVar

from rlhf_core.errors import EnvironmentProblem, RlhfError
from tasks.frame.leave import leave
from tasks.launch import die_with_parent

Result = TypeVar("Result")
Tell = Callable[[Any], None]
Job = Callable[[Tell], Result]


def in_turn(jobs: Mapping[str, Job[Result]], tell: Tell) -> dict[str, Result]:
    """Do the jobs in this process, one after the other; `tell` gets what each of them tells while it works."""
    return {name: job(tell) for name, job in jobs.items()}


def side_by_side(jobs: Mapping[str, Job[Result]], tell: Tell, *, at_most: int) -> dict[str, Result]:
    """Do each job in a process of its own, `at_most` at a time; results in the order of `jobs`.

    Args:
        jobs: by name. What a job tells or returns is sent to this process.
        tell: gets what they tell while they work, in no fixed order.
        at_most: how many work at a time.

    Raises:
        EnvironmentProblem: a process was killed.
        Exception: what a job raised; the others are ended.
    """
    workers = {name: _Worker(job) for name, job in jobs.items()}
    waiting, working = list(workers), dict[Connection, str]()
    results: dict[str, Result] = {}
    try:
        while waiting or working:
            while waiting and len(working) < at_most:
                name = waiting.pop(0)
                working[workers[name].start()] = name
            for pipe in wait(list(working)):
                name = working[pipe]  # type: ignore[index]
                kind, word = workers[name].hear(name)
                if kind == "said":
                    tell(word)
                    continue
                del working[pipe]  # type: ignore[arg-type]
                if kind == "failed":
                    raise word
                results[name] = word
    finally:
        for worker in workers.values():
            worker.end()
    return {name: results[name] for name in jobs}


class _Worker:
    """A forked process that waits for its turn, then does a job."""

    def __init__(self, job: Job[Any]) -> None:
        self._pipe, theirs = Pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            die_with_parent(parent)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            self._pipe.close()
            _work(theirs, job)
        theirs.close()

    def start(self) -> Connection:
        """Give it its turn; returns where it is heard."""
        self._pipe.send("go")
        return self._pipe

    def hear(self, name: str) -> tuple[str, Any]:
        """What it says next: `said`, `done` or `failed`, and what."""
        try:
            kind, word = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise EnvironmentProblem(
                f"{name}: its process was killed from outside, perhaps for want of memory. "
                "Fix: free memory, or set machine.at_once: 1, then `rlhf resume`"
            ) from error
        return kind, word

    def end(self) -> None:
        """End the process, if it has not ended by itself; before its pipe, which it would miss with a traceback."""
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet, so the pid is still its own
        os.waitpid(self.pid, 0)
        self._pipe.close()


def _work(pipe: Connection, job: Job[Any]) -> NoReturn:
    def work() -> int:
        pipe.recv()  # its turn
        try:
            pipe.send(("done", job(lambda word: pipe.send(("said", word)))))
        except RlhfError as error:
            pipe.send(("failed", error))
        except Exception as error:
            import traceback

            traceback.print_exc()
            pipe.send(("failed", RuntimeError(f"{type(error).__name__}: {error}")))
        return 0

    leave(work)
