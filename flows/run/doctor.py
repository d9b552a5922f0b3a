"""What on this machine keeps the pipeline from running, and how to cure it."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from packaging.version import Version
from pydantic import BaseModel

from flows.local.ports import LOOPBACK, usual_ports
from flows.local.servers import answers, healthy, known_servers
from flows.local.settings import users_server
from rlhf_core.errors import RlhfError
from tasks import paths
from tasks.frame.lock_file import readable
from tasks.lineage.model_folders import check_model_folders
from tasks.params import load_params
from tasks.paths import LOCK

LEAST_PYTHON = (3, 11)
FREE_MIB_WARN, FREE_MIB_FAIL = 5_000, 500
NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "numpy", "datasets", "great-expectations")
CURE_INSTALL = "pip install -e . -c constraints.txt"
# Newer ones install without complaint and break Prefect's server in silence: it cannot start, or never makes a
# scheduled run.
TOO_NEW = {"fastapi": ("0.151", "the Prefect server cannot start"), "sqlalchemy": ("2.1", "no scheduled run is made")}

Level = Literal["ok", "warn", "fail"]


class Finding(BaseModel):
    """One thing that was looked at: what, what was found, and the cure where it is not well."""

    level: Level
    what: str
    found: str
    cure: str = ""


def examine(root: Path) -> list[Finding]:
    """Look at everything; a look that fails is a finding itself."""
    looks: tuple[Callable[[Path], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _parameters,
        _disk,
        _ports,
        _prefect,
        _mlflow,
        _dvc,
        _gpu,
    )
    findings: list[Finding] = []
    for look in looks:
        try:
            findings += look(root)
        except Exception as error:  # a doctor that falls ill must still report the rest
            name = look.__name__.removeprefix("_")
            findings.append(Finding(level="fail", what=name, found=f"{type(error).__name__}: {error}"))
    return findings


def _python(root: Path) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info[:2] >= LEAST_PYTHON
    cure = "" if good else "install Python 3.11 or newer"
    yield Finding(level="ok" if good else "fail", what="Python", found=found, cure=cure)


def _packages(root: Path) -> Iterator[Finding]:
    for package in (*NEEDED, "prefect", "mlflow", "dvc", *TOO_NEW):
        yield examine_package(package)


def examine_package(package: str) -> Finding:
    """Whether a package is there and not one of the versions that break things in silence."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(level="fail", what=package, found="not installed", cure=CURE_INSTALL)
    if package in TOO_NEW:
        limit, harm = TOO_NEW[package]
        if Version(found).release >= Version(limit).release:  # its pre-releases too
            cure = f"pip install '{package}<{limit}'"
            return Finding(level="fail", what=package, found=f"{found}: {harm} with {limit} and newer", cure=cure)
    return Finding(level="ok", what=package, found=found)


def _parameters(root: Path) -> Iterator[Finding]:
    try:
        params = load_params(root / paths.PARAMS)
        check_model_folders(root, (root / paths.PARAMS).read_text())
    except RlhfError as error:
        problem, _, cure = str(error).partition(" Fix: ")
        yield Finding(level="fail", what="params.yaml", found=problem, cure=cure)
        return
    yield Finding(level="ok", what="params.yaml", found="read and checked")
    from flows.run.request import check_data

    try:
        check_data(root, params)
        yield Finding(level="ok", what="data", found="every file that params.yaml names is there")
    except RlhfError as error:
        problem, _, cure = str(error).partition(" Fix: ")
        yield Finding(level="fail", what="data", found=problem, cure=cure)


def _disk(root: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(root).free // 2**20
    level: Level = "fail" if free < FREE_MIB_FAIL else "warn" if free < FREE_MIB_WARN else "ok"
    cure = "" if level == "ok" else "free space; dvc gc --workspace drops outputs that nothing uses"
    yield Finding(level=level, what="disk", found=f"{free:,} MiB free", cure=cure)
    if not os.access(root, os.W_OK):
        yield Finding(level="fail", what="disk", found=f"{root} cannot be written", cure="change its owner or mode")


def _ports(root: Path) -> Iterator[Finding]:
    servers = known_servers(paths.home(root))
    for name, port in usual_ports(paths.home(root)).items():
        own = servers.get(name)
        if own and own.port == port:
            yield Finding(level="ok", what=f"port {port}", found=f"our {name} server")
        elif _taken(port):
            yield Finding(
                level="warn",
                what=f"port {port}",
                found="taken by another program",
                cure=f"nothing to do: another port is chosen for {name}",
            )
        else:
            yield Finding(level="ok", what=f"port {port}", found="free")


def _taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _prefect(root: Path) -> Iterator[Finding]:
    own = users_server()
    if own:
        good = answers(f"{own.rstrip('/')}/health", timeout_s=5.0)
        cure = "" if good else "correct or unset PREFECT_API_URL"
        yield Finding(level="ok" if good else "fail", what="Prefect", found=f"{own} (PREFECT_API_URL)", cure=cure)
        return
    yield from _own_server(root, "prefect", "Prefect", "started when a run needs it")


def _mlflow(root: Path) -> Iterator[Finding]:
    from tasks.tracking import pending, tracking_uri
    from tasks.tracking.store import DATABASE, public_uri

    uri = tracking_uri(root)
    if uri.startswith("http"):
        good = answers(f"{uri.rstrip('/')}/health", timeout_s=5.0)
        cure = "" if good else "start it, or correct MLFLOW_TRACKING_URI"
        yield Finding(level="ok" if good else "fail", what="MLflow store", found=public_uri(uri), cure=cure)
    elif (paths.home(root) / DATABASE).exists() or not uri.startswith("sqlite"):
        yield Finding(level="ok", what="MLflow store", found=public_uri(uri))
    else:
        yield Finding(level="ok", what="MLflow store", found="not made yet; the first run makes it")
    waiting = pending(root)
    if waiting:
        yield Finding(level="warn", what="MLflow records", found=f"{waiting} wait to be sent", cure="rlhf sync")
    yield from _own_server(root, "mlflow", "MLflow server", "rlhf ui starts it")


def _own_server(root: Path, name: str, what: str, when_off: str) -> Iterator[Finding]:
    server = known_servers(paths.home(root)).get(name)
    if server is None:
        yield Finding(level="ok", what=what, found=f"not running; {when_off}")
    elif healthy(server):
        yield Finding(level="ok", what=what, found=server.url)
    else:
        yield Finding(level="fail", what=what, found=f"{server.url} does not answer", cure="rlhf down, then rlhf up")


def _dvc(root: Path) -> Iterator[Finding]:
    lock = root / LOCK
    if lock.exists() and not readable(lock.read_text(encoding="utf-8", errors="replace")):
        cure = "rlhf run --dry-run takes up the last copy; settle a merge conflict by git first"
        yield Finding(level="fail", what=LOCK.name, found="cut off, or otherwise none of DVC's", cure=cure)
    remotes = subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "list"], cwd=root, capture_output=True, text=True, check=False
    )
    if remotes.returncode != 0:
        last = (remotes.stderr.strip().splitlines() or ["dvc says nothing"])[-1]
        yield Finding(level="fail", what="DVC", found=last, cure="run from the project's folder; git clone it anew")
        return
    listed = [line.split() for line in remotes.stdout.splitlines() if line.strip()]
    if not listed:
        cure = "dvc remote add -d NAME PLACE"
        yield Finding(level="warn", what="DVC remote", found="none: data lies on this machine only", cure=cure)
    for name, place, *_ in listed:
        local = "://" not in place
        if local and not Path(place).exists():
            yield Finding(level="fail", what="DVC remote", found=f"{name}: {place} is missing", cure="git checkout it")
        else:
            yield Finding(level="ok", what="DVC remote", found=f"{name}: {place}")


def _gpu(root: Path) -> Iterator[Finding]:
    import torch

    wanted = load_params(root / paths.PARAMS).compute.device
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory // 2**20
        yield Finding(level="ok", what="GPU", found=f"{torch.cuda.get_device_name(0)}, {memory:,} MiB")
    elif wanted == "cuda":
        cure = "compute.device: auto, or install a torch for this GPU"
        yield Finding(level="fail", what="GPU", found="none, and params.yaml asks for cuda", cure=cure)
    else:
        yield Finding(level="ok", what="GPU", found="none; stages run on the CPU")
