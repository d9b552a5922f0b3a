"""How busy the machine was while a stage ran, recorded on the stage's run under the names that MLflow itself uses."""

import contextlib
import threading
import time
from typing import Any

from tasks.tracking.recorder import Recorder

PREFIX = "system/"  # MLflow's page shows such figures under "System metrics"


class SystemWatch:
    """Samples processors, memory, disk, network and, where its library is there, the GPU, in a thread of its own.

    MLflow's own monitor writes to the store by itself; these go through the recorder, so that they wait like all
    records when the store is away. Nothing here is read by a stage.

    Args:
        recorder: is given the figures.
        every_s: seconds between two samples; a stage has one at its end at least.

    Attributes:
        ready: set once the machine can be read.
    """

    def __init__(self, recorder: Recorder, every_s: float) -> None:
        self._recorder, self._every_s = recorder, every_s
        self._steps: dict[str, int] = {}  # of the stages that run now: the next step
        self._changed = threading.Condition()
        self._over = False
        self.ready = threading.Event()
        self._monitors: list[Any] = []
        self._thread = threading.Thread(target=self._run, name="system-watch", daemon=True)
        self._thread.start()

    def begin(self, stage: str) -> None:
        """A stage starts, or is taken up again: its steps go on."""
        with self._changed:
            self._steps[stage] = self._recorder.next_step(stage, f"{PREFIX}cpu_utilization_percentage")

    def end(self, stage: str) -> None:
        """A stage has ended: one last sample for it."""
        with self._changed:
            if stage in self._steps:
                self._sample([stage])
                del self._steps[stage]

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # a machine that cannot be measured is no reason to end a run
            self._monitors = _monitors()
            for monitor in self._monitors:
                monitor.collect_metrics()  # the first reading of a processor is since nothing, and means nothing
                monitor.clear_metrics()
            self.ready.set()
            while True:
                with self._changed:
                    if self._changed.wait_for(lambda: self._over, timeout=self._every_s):
                        return
                    self._sample(list(self._steps))

    def _sample(self, stages: list[str]) -> None:
        figures: dict[str, float] = {}
        for monitor in self._monitors if self.ready.is_set() else ():
            monitor.collect_metrics()
            figures |= {f"{PREFIX}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        for stage in stages if figures else ():
            row = {"step": self._steps[stage], "time": time.time(), "metrics": figures}
            self._recorder.metrics(stage, [row])
            self._steps[stage] += 1


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no GPU, or no library to ask it with
        monitors.append(GPUMonitor())
    return monitors
