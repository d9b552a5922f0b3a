"""What the log of a flow run holds at its end: why it ended, in one line, and no traceback that leads into Prefect."""

import logging

from prefect.exceptions import CancelledRun, CrashedRun, FailedRun
from prefect.logging import get_logger


class _EndOnce(logging.Filter):
    """Leaves out what Prefect's engine logs under a worker where a flow returns a state that is no success.

    From prefect 3.8 (`run_flow` in prefect/flow_engine.py); the state with its message is logged before.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be seen."""
        kind = record.exc_info[0] if record.exc_info else None
        return kind not in (FailedRun, CancelledRun, CrashedRun)


_FILTER = _EndOnce()


def end_in_one_line() -> None:
    """Have this process's flow runs end in one line; a flow calls it first."""
    get_logger("prefect.flow_runs").addFilter(_FILTER)
