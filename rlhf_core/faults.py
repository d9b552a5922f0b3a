"""Named points at which a test may make the process fail, to prove that nothing is lost.

A point does nothing unless the environment variable `RLHF_FAULT` names it: `name[@nth][#rank]:action`, where `nth`
counts from 1, `rank` is the process it is meant for (else any), and `action` is one of `kill`, `term`, `raise`,
`sleep`, `enospc`. This is the one place in the package that reads the environment: a fault has to reach a process that
a test starts indirectly.
"""

import errno
import os
import signal
import time
from collections import Counter

FAULT_POINTS = frozenset(
    {
        "checkpoint.written",
        "checkpoint.before_rename",
        "checkpoint.after_rename",
        "train.step",
        "stage.before_publish",
        "stage.during_publish",
        "stage.after_publish",
        "candidates.between",
        "delivery.sent",
        "promotion.noted",
        "promotion.champion_moved",
    }
)

hits: Counter[str] = Counter()  # how often the point that is ordered was passed; a test clears it before the next


def faultpoint(name: str) -> None:
    """Fail here if `RLHF_FAULT` says so.

    Raises:
        ValueError: `RLHF_FAULT` names a point or an action that does not exist.
        RuntimeError: the action `raise`.
        OSError: the action `enospc`.
    """
    order = os.environ.get("RLHF_FAULT")
    if not order:
        return
    target, _, action = order.partition(":")
    place, _, rank = target.partition("#")
    point, _, nth = place.partition("@")
    if point not in FAULT_POINTS or name not in FAULT_POINTS:
        raise ValueError(f"RLHF_FAULT={order!r}: unknown fault point. Fix: one of {sorted(FAULT_POINTS)}")
    if point != name or (rank and rank != os.environ.get("RANK", "0")):
        return
    hits[name] += 1
    if hits[name] == int(nth or 1):
        _fail(action, order)


def _fail(action: str, order: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "raise":
            raise RuntimeError(f"fault ordered by RLHF_FAULT={order}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "sleep":
            time.sleep(3600)
        case _:
            raise ValueError(f"RLHF_FAULT={order!r}: unknown action {action!r}")
