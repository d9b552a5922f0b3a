"""`rlhf up`, `down`, `ui`."""

import json as json_format
import os
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path

from flows.local.servers import Server, ensure_mlflow, ensure_prefect, ensure_worker, known_servers, stop_servers
from flows.local.settings import client_settings, prefect_settings, users_server
from flows.root import find_root
from tasks import paths


def up(*, json: bool = False) -> int:
    """Start the Prefect server, a worker, and the MLflow server on this machine, where they are not running.

    They listen on 127.0.0.1 only, answer their own pages only, and report nothing to anybody.

    Parameters
    ----------
    json:
        Print name, address and process of each as JSON.
    """
    home = main_checkout()
    prefect = start(home, "prefect", ensure_prefect)
    use(home, prefect)
    servers = [prefect, start_worker(home), start(home, "mlflow", ensure_mlflow)]
    _print_servers(servers, as_json=json)
    return 0


def down(*, json: bool = False) -> int:
    """End the servers that were started here; others are left alone.

    Parameters
    ----------
    json:
        Print the names of what was ended as JSON.
    """
    ended = stop_servers(main_checkout())
    print(json_format.dumps(ended) if json else f"ended: {', '.join(ended) or 'nothing was running'}")
    return 0


def ui(*, json: bool = False) -> int:
    """Print the addresses of the Prefect and MLflow pages, starting what is missing; on a desktop, open them.

    Parameters
    ----------
    json:
        Print the addresses as JSON and open nothing.
    """
    from tasks.tracking.store import runs_page  # here: it takes half a second

    home = main_checkout()
    own = users_server()
    prefect = own.removesuffix("/api") if own else start(home, "prefect", ensure_prefect).url
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    mlflow = runs_page(home, str(uri if uri.startswith("http") else start(home, "mlflow", ensure_mlflow).url))
    if json:
        print(json_format.dumps({"prefect": prefect, "mlflow": mlflow}))
        return 0
    print(f"Prefect  {prefect}\nMLflow   {mlflow}")
    if has_desktop():
        for url in (prefect, mlflow):
            webbrowser.open(url)
    return 0


def has_desktop() -> bool:
    """Whether opening a page makes sense: a person at a terminal, and a display."""
    display = sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    return sys.stdout.isatty() and display


def main_checkout() -> Path:
    """The checkout that holds servers and stores."""
    return paths.home(find_root(Path.cwd()))


def start(home: Path, name: str, ensure: Callable[[Path], Server]) -> Server:
    """Start one server, saying so on stderr when it is not there yet, since that takes seconds."""
    if name not in known_servers(home):
        print(f"starting {name}", file=sys.stderr)
    return ensure(home)


def use(home: Path, server: Server | None) -> None:
    """Point this process at the server, before prefect is imported and reads its settings."""
    os.environ.update(prefect_settings(home, server.port) if server else client_settings())


def start_worker(home: Path) -> Server:
    """Start the worker where it is not there, after tidying up what the time without it left in Prefect.

    Runs of deployments that somebody deleted go in either case. This process must have been pointed at the server.
    """
    from flows.deployments import ensure_pool
    from flows.leftovers import cancel_without_deployment, tidy

    ensure_pool()
    cancel_without_deployment()
    if "worker" not in known_servers(home):
        tidy(print_line=lambda line: print(line, file=sys.stderr))
    return start(home, "worker", ensure_worker)


def _print_servers(servers: list[Server], *, as_json: bool) -> None:
    if as_json:
        print(json_format.dumps([{"name": server.name, "url": server.url, "pid": server.pid} for server in servers]))
        return
    for server in servers:
        print(f"{server.name:<8} {server.url or 'running':<24} process {server.pid}, log {server.log}")
