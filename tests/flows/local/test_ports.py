"""Where the servers listen: at the same port from start to start, elsewhere only where somebody else listens."""

import json
import socket
from pathlib import Path

import pytest

from flows.local.ports import FIRST_PORT, LOOPBACK, PORTS_FILE, choose_port, free_port, note_port, usual_ports


def test_a_taken_port_is_stepped_around() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_a_server_listens_where_it_listened_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert usual_ports(tmp_path) == FIRST_PORT
    port = free_port(0)
    note_port(tmp_path, "prefect", port)
    assert choose_port(tmp_path, "prefect") == port
    assert usual_ports(tmp_path) == {"prefect": port, "mlflow": FIRST_PORT["mlflow"]}
    assert capsys.readouterr().err == ""
    with socket.socket() as taken:
        taken.bind((LOOPBACK, port))
        taken.listen()
        other = choose_port(tmp_path, "prefect")
    assert other != port
    assert f"port {port} is taken by another program: prefect listens on {other}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[]", '{"prefect": "4200"', '{"prefect": 0}', '{"prefect": 70000}', '{"prefect": "x"}']
)
def test_a_note_that_is_no_note_counts_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / PORTS_FILE).parent.mkdir()
    (tmp_path / PORTS_FILE).write_text(text)
    assert usual_ports(tmp_path) == FIRST_PORT


def test_the_note_is_plain_json(tmp_path: Path) -> None:
    (tmp_path / PORTS_FILE).parent.mkdir()
    note_port(tmp_path, "mlflow", 5001)
    assert json.loads((tmp_path / PORTS_FILE).read_text())["mlflow"] == 5001
