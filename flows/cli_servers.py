"""`rlhf up`, `down`, `ui`, `deploy`."""

import json as json_format
import os
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flows.runs import find_root
from flows.servers import Server, ensure_mlflow, ensure_prefect, ensure_worker, known_servers, stop_servers
from flows.settings import client_settings, prefect_settings, users_server
from tasks import paths


def up(*, json: bool = False) -> int:
    """Start the Prefect server, a worker, and the MLflow server on this machine, where they are not running.

    They listen on 127.0.0.1 only, answer their own pages only, and report nothing to anybody.

    Parameters
    ----------
    json:
        Print name, address and process of each as JSON.
    """
    home = _home()
    prefect = _start(home, "prefect", ensure_prefect)
    _use(home, prefect)
    _make_pool()
    servers = [prefect, _start(home, "worker", ensure_worker), _start(home, "mlflow", ensure_mlflow)]
    _print_servers(servers, as_json=json)
    return 0


def down(*, json: bool = False) -> int:
    """End the servers that were started here; others are left alone.

    Parameters
    ----------
    json:
        Print the names of what was ended as JSON.
    """
    ended = stop_servers(_home())
    print(json_format.dumps(ended) if json else f"ended: {', '.join(ended) or 'nothing was running'}")
    return 0


def ui(*, json: bool = False) -> int:
    """Print the addresses of the Prefect and MLflow pages, starting what is missing; on a desktop, open them.

    Parameters
    ----------
    json:
        Print the addresses as JSON and open nothing.
    """
    home = _home()
    own = users_server()
    prefect = own.removesuffix("/api") if own else _start(home, "prefect", ensure_prefect).url
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    mlflow = uri if uri.startswith("http") else _start(home, "mlflow", ensure_mlflow).url
    if json:
        print(json_format.dumps({"prefect": prefect, "mlflow": mlflow}))
        return 0
    print(f"Prefect  {prefect}\nMLflow   {mlflow}")
    if has_desktop():
        for url in (prefect, mlflow):
            webbrowser.open(url)
    return 0


def deploy(
    *,
    name: str = "pipeline",
    cron: str | None = None,
    interval: int | None = None,
    timezone: str = "UTC",
    paused: bool = False,
    profile: str | None = None,
    set: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = (),
    data: Annotated[tuple[str, ...], Parameter(name="--data", negative="", consume_multiple=False)] = (),
    json: bool = False,
) -> int:
    """Register the pipeline with Prefect, so that it can be started from the UI or runs on a schedule.

    Parameters
    ----------
    name:
        Name of the deployment.
    cron:
        Five fields, such as '0 3 * * *' for every night at three.
    interval:
        Seconds between runs.
    timezone:
        Of the schedule, such as Europe/Berlin.
    paused:
        Register the schedule without switching it on; the UI has the switch.
    profile:
        What a run does unless the form says otherwise, as in rlhf run.
    set:
        As in rlhf run.
    data:
        As in rlhf run; paths are made absolute.
    json:
        Print id and address as JSON.
    """
    from flows.cli_run import read_request
    from flows.runs import check_request

    home = _home()
    files = {kind: str(Path(path).absolute()) for kind, path in read_request(None, (), data, None, None).data.items()}
    request = read_request(profile, set, (), None, None).model_copy(update={"data": files})
    check_request(home, request)
    own = users_server()
    server = None if own else _start(home, "prefect", ensure_prefect)
    _use(home, server)
    from flows.deployments import deploy as register
    from flows.deployments import schedule_of

    schedule = schedule_of(cron, interval, timezone, paused=paused)
    found = register(home, name, request, schedule)
    if server:
        _start(home, "worker", ensure_worker)
    base = own.removesuffix("/api") if own else str(server and server.url)
    url = f"{base}/deployments/deployment/{found}"
    when = "paused" if paused else f"cron {cron}" if cron else f"every {interval} s" if interval else "by hand"
    print(json_format.dumps({"id": str(found), "url": url, "schedule": when}) if json else f"{name} ({when}): {url}")
    return 0


def has_desktop() -> bool:
    """Whether opening a page makes sense: a person at a terminal, and a display."""
    display = sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    return sys.stdout.isatty() and display


def _home() -> Path:
    return paths.home(find_root(Path.cwd()))


def _start(home: Path, name: str, ensure: Callable[[Path], Server]) -> Server:
    """Start one server, saying so on stderr when it is not there yet, since that takes seconds."""
    if name not in known_servers(home):
        print(f"starting {name}", file=sys.stderr)
    return ensure(home)


def _use(home: Path, server: Server | None) -> None:
    """Point this process at the server, before prefect is imported and reads its settings."""
    os.environ.update(prefect_settings(home, server.port) if server else client_settings())


def _make_pool() -> None:
    from flows.deployments import ensure_pool

    ensure_pool()


def _print_servers(servers: list[Server], *, as_json: bool) -> None:
    if as_json:
        print(json_format.dumps([{"name": server.name, "url": server.url, "pid": server.pid} for server in servers]))
        return
    for server in servers:
        print(f"{server.name:<8} {server.url or 'running':<24} process {server.pid}, log {server.log}")
