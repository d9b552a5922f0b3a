"""`rlhf deploy`: the pipeline in the Prefect UI, on a schedule or started from a form."""

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from flows.cli.servers import main_checkout, start, start_worker, use
from flows.local.servers import ensure_prefect
from flows.local.settings import users_server
from flows.run.request import RunRequest
from flows.schedules import USUAL_ZONE, check_name, read_timing
from rlhf_core.errors import ConfigError

DAY_MINUTES = 24 * 60


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class When:
    """When the pipeline runs by itself.

    Parameters
    ----------
    cron:
        Five fields, such as '0 3 * * *' for every night at three.
    interval:
        Seconds between runs.
    timezone:
        Of the schedule, such as Europe/Berlin.
    paused:
        Register the schedule without switching it on; the UI has the switch.
    """

    cron: str | None = None
    interval: int | None = None
    timezone: str = USUAL_ZONE
    paused: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class What:
    """What the form holds at first.

    Parameters
    ----------
    profile:
        What a run does unless the form says otherwise, as in rlhf run.
    set:
        As in rlhf run.
    data:
        As in rlhf run; paths are made absolute.
    """

    profile: str | None = None
    set: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = ()
    data: Annotated[tuple[str, ...], Parameter(name="--data", negative="", consume_multiple=False)] = ()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Limits:
    """What keeps runs from standing in each other's way.

    Parameters
    ----------
    timeout:
        Minutes after which a stage is ended.
    run_timeout:
        Minutes after which a run is ended as a whole.
    retries:
        How often a stage is tried again after a fault of the machine (exit code 7), later and later.
    collision:
        What becomes of a run that is due while one of this deployment is at work: skip or queue.
    missed:
        Of scheduled runs that are due at once after everything was down: newest or all.
    at_once:
        Runs at a time over all deployments of the pipeline; left out, it stays as it is, at first 1.
    """

    timeout: int | None = None
    run_timeout: int = DAY_MINUTES
    retries: int = 2
    collision: Literal["skip", "queue"] = "skip"
    missed: Literal["newest", "all"] = "newest"
    at_once: int | None = None


def deploy(
    *,
    name: str = "pipeline",
    when: When = When(),
    what: What = What(),
    limits: Limits = Limits(),
    list: bool = False,
    delete: str | None = None,
    json: bool = False,
) -> int:
    """Register the pipeline with Prefect, so that it can be started from the UI or runs on a schedule.

    Parameters
    ----------
    name:
        Name of the deployment.
    list:
        List the deployments and do nothing else.
    delete:
        Delete the deployment of this name and do nothing else.
    json:
        Print id and address as JSON.
    """
    home = main_checkout()
    if list or delete is not None:
        return _look_after(home, delete, list_all=list, as_json=json)
    timing = read_timing(when.cron, when.interval, when.timezone, paused=when.paused)
    if limits.at_once is not None and limits.at_once < 1:
        raise ConfigError(f"--at-once {limits.at_once}: nothing could run. Fix: 1 or more")
    check_name(name)
    request = _request(home, what, limits)
    elsewhere = users_server() is not None  # asked before this process is pointed at a server of ours
    base = _reach(home)
    from flows.deployments import deploy as register

    queue = limits.collision == "queue"
    found = register(home, name, request, timing, missed=limits.missed, queue=queue, at_once=limits.at_once)
    if not elsewhere:
        start_worker(home)
    shown = {"id": str(found), "url": f"{base}/deployments/deployment/{found}", "schedule": str(timing)}
    print(json_format.dumps(shown) if json else f"{name} ({timing}): {shown['url']}")
    return 0


def _request(home: Path, what: What, limits: Limits) -> RunRequest:
    from flows.cli.run import read_request
    from flows.run.request import check_request

    bounds = {"stage_timeout_minutes": limits.timeout, "run_timeout_minutes": limits.run_timeout}
    request = read_request(what.profile, what.set, what.data, None, **bounds, retries=limits.retries)
    files = {kind: str(Path(path).absolute()) for kind, path in request.data.items()}
    request = request.model_copy(update={"data": files})
    check_request(home, request)
    return request


def _reach(home: Path) -> str:
    """Point this process at the Prefect server, starting it where it is not there; returns the address of its page."""
    own = users_server()
    server = None if own else start(home, "prefect", ensure_prefect)
    use(home, server)
    return own.removesuffix("/api") if own else str(server and server.url)


def _look_after(home: Path, unwanted: str | None, *, list_all: bool, as_json: bool) -> int:
    if list_all and unwanted is not None:
        raise ConfigError("--list and --delete: both given. Fix: give one of them")
    base = _reach(home)
    from flows.deployments import delete, listed
    from flows.leftovers import cancel_without_deployment

    if unwanted is not None:
        delete(unwanted)
        cancel_without_deployment()
        print(json_format.dumps({"deleted": unwanted}) if as_json else f"deleted: {unwanted}")
        return 0
    found = listed()
    if as_json:
        print(json_format.dumps([one.model_dump(mode="json") for one in found]))
        return 0
    for one in found:
        profile = f"profile {one.profile}" if one.profile else "params.yaml"
        print(f"{one.name}  {one.schedule}  {profile}  {base}/deployments/deployment/{one.id}")
    if not found:
        print("no deployment of the pipeline; rlhf deploy makes one")
    return 0
