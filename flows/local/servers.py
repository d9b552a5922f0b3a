"""The local servers: Prefect, MLflow, and a Prefect worker, on the loopback address only.

Each is a process of its own that outlives the command that started it. `.rlhf/servers.json` of the main checkout
says which process it is (pid and kernel start time, so that no stranger is ever ended) and where it listens.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from flows.local.ports import FIRST_PORT, LOOPBACK, choose_port, note_port
from flows.local.settings import POOL, mlflow_settings, prefect_settings
from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.frame.locks import boot_id
from tasks.frame.runner import group_members
from tasks.frame.watchdog import process_start
from tasks.loopback import open_url, reach_loopback_directly

STATE_FILE = paths.STATE / "servers.json"
LOGS = paths.STATE / "logs"
START_SECONDS = 180.0
ANSWER_SECONDS = 30.0
END_SECONDS = 8.0


class Server(BaseModel):
    """A server that was started here.

    Attributes:
        name: `prefect`, `mlflow` or `worker`.
        pid: leader of its process group.
        process_start: kernel start time of that process.
        boot: id of the machine's boot.
        port: where it listens; None for the worker, which only asks.
        asks: port of the Prefect server that a worker asks; None for a server.
        log: its output, relative to the main checkout.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    pid: int
    process_start: str
    boot: str
    port: int | None
    asks: int | None = None
    log: str

    @property
    def url(self) -> str:
        """Address of its page."""
        return f"http://{LOOPBACK}:{self.port}" if self.port else ""

    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        return self.boot == boot_id() and process_start(self.pid) == self.process_start


_STATE = TypeAdapter(dict[str, Server])


def known_servers(home: Path) -> dict[str, Server]:
    """The servers of a main checkout that are running, by name. Reads a file only."""
    try:
        servers = _STATE.validate_python(json.loads((home / STATE_FILE).read_text()))
    except (OSError, ValueError, ValidationError):
        return {}
    return {name: server for name, server in servers.items() if server.alive()}


def healthy(server: Server) -> bool:
    """Whether a server answers; a worker is well while its process lives."""
    if server.port is None:
        return server.alive()
    return answers(server.url + ("/api/health" if server.name == "prefect" else "/health"))


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a plain GET is answered with 200."""
    try:
        return open_url(url, timeout_s) == 200
    except (OSError, ValueError, HTTPException):
        return False


def ensure_prefect(home: Path) -> Server:
    """Return the running Prefect server, starting it when it is not there.

    Raises:
        EnvironmentProblem: it does not come up; the message names its log.
    """

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "flows.local.prefect_server", str(port)]

    return _ensure(home, "prefect", command, lambda port: prefect_settings(home, port))


def ensure_mlflow(home: Path) -> Server:
    """Return the running MLflow server, starting it over the checkout's store when it is not there.

    Raises:
        EnvironmentProblem: the store or the server does not come up.
    """
    from tasks.tracking.store import ARTIFACTS, open_store

    def command(port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"),
            *("--allowed-hosts", f"{LOOPBACK}:{port},localhost:{port}"),
            *("--cors-allowed-origins", f"http://{LOOPBACK}:{port}"),
            *("--x-frame-options", "DENY", "--serve-artifacts", "--artifacts-destination", str(home / ARTIFACTS)),
        ]

    return _ensure(home, "mlflow", command, lambda port: mlflow_settings(open_store(home).uri))


def ensure_worker(home: Path) -> Server:
    """Return the running worker of the process pool, starting it when it is not there or asks a server that is gone.

    Raises:
        EnvironmentProblem: it ends at once.
    """
    prefect = ensure_prefect(home)
    command = [
        sys.executable,
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        POOL,
        "--type",
        "process",
        "--name",
        "rlhf",
    ]
    settings = prefect_settings(home, prefect.port)
    return _ensure(home, "worker", lambda port: command, lambda port: settings, asks=prefect.port)


def stop_servers(home: Path) -> list[str]:
    """End the servers that were started here, the worker first, and return their names. Strangers are left alone."""
    with _servers_lock(home):
        servers = known_servers(home)
        ended: list[str] = [name for name in ("worker", "mlflow", "prefect") if name in servers]
        for name in ended:
            _end(servers[name])
        (home / STATE_FILE).unlink(missing_ok=True)
    return ended


def _ensure(
    home: Path,
    name: str,
    command: Callable[[int], list[str]],
    settings: Callable[[int], Mapping[str, str]],
    asks: int | None = None,
) -> Server:
    with _servers_lock(home):
        servers = known_servers(home)
        if name in servers and servers[name].asks == asks and _answers_in_time(servers[name]):
            return servers[name]
        if name in servers:
            _end(servers.pop(name))
        port = choose_port(home, name) if name in FIRST_PORT else 0
        server = _start(home, name, command(port), settings(port), port or None).model_copy(update={"asks": asks})
        write_json(home / STATE_FILE, _STATE.dump_python(servers | {name: server}))
        _wait_until_healthy(home, server)
        if server.port:
            note_port(home, name, server.port)
        return server


def _answers_in_time(server: Server) -> bool:
    """Whether a server answers within half a minute: one that is busy must not be ended, and its runs with it."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while server.alive():
        if healthy(server):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return False


@contextmanager
def _servers_lock(home: Path) -> Iterator[None]:
    path = home / paths.LOCKS / "servers.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=START_SECONDS)
    except Timeout:
        raise EnvironmentProblem(
            f"{path}: another process has been starting servers for {START_SECONDS:.0f} s. Fix: end it, then rlhf up"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _start(home: Path, name: str, command: list[str], settings: Mapping[str, str], port: int | None) -> Server:
    log = home / LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | settings | {"PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)])}
    reach_loopback_directly(environment)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(
        name=name,
        pid=process.pid,
        process_start=process_start(process.pid) or "",
        boot=boot_id(),
        port=port,
        log=str(log.relative_to(home)),
    )


def _wait_until_healthy(home: Path, server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if not server.alive():
            break
        if healthy(server):
            return
        time.sleep(0.2)
    tail = (home / server.log).read_text(errors="replace").strip().splitlines()[-1:]
    _end(server)
    raise EnvironmentProblem(
        f"{server.log}: the {server.name} server does not come up ({tail[0] if tail else 'it says nothing'}). "
        "Fix: read that log; rlhf doctor"
    )


def _end(server: Server) -> None:
    """SIGTERM to the server's group, then SIGKILL for what is left of it."""
    for number, patience_s in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, 2.0)):
        members = group_members(server.pid)
        if not members:
            return
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience_s
        while group_members(server.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
