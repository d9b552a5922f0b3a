"""Where the local servers listen: the same place from start to start, so that links to their pages live on."""

import json
import socket
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import write_json
from tasks import paths

LOOPBACK = "127.0.0.1"
FIRST_PORT = {"prefect": 4200, "mlflow": 5000}
PORTS_FILE = paths.STATE / "ports.json"
_PORTS = TypeAdapter(dict[str, Annotated[int, Field(gt=0, lt=65536)]])


def usual_ports(home: Path) -> dict[str, int]:
    """Port of each server by name: where it listened last in this checkout; before its first start, its usual one."""
    try:
        noted = _PORTS.validate_python(json.loads((home / PORTS_FILE).read_text()))
    except (OSError, ValueError, ValidationError):
        noted = {}
    return FIRST_PORT | noted


def choose_port(home: Path, name: str) -> int:
    """The server's usual port, or another where a stranger listens there, which is said on stderr."""
    usual = usual_ports(home)[name]
    port = free_port(usual)
    if port != usual:
        where = f"{name} listens on {port} from now on, and links to {usual} lead elsewhere"
        print(f"port {usual} is taken by another program: {where}", file=sys.stderr)
    return port


def note_port(home: Path, name: str, port: int) -> None:
    """Keep where a server listens for its next start."""
    write_json(home / PORTS_FILE, usual_ports(home) | {name: port})


def free_port(preferred: int) -> int:
    """`preferred` if nothing listens there, else one that the kernel gives."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EnvironmentProblem(f"{LOOPBACK}: no free port. Fix: end what holds them (rlhf doctor)")
