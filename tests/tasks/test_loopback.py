"""This machine's own addresses are asked without a proxy by the real HTTP clients, and other addresses with it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tasks.loopback import is_loopback, open_url, reach_loopback_directly

ROOT = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9"
ASK = """
import json, sys
from tasks.loopback import reach_loopback_directly
left_out = reach_loopback_directly()
import urllib.request, httpx, requests
asks = {
    "urllib": lambda url: urllib.request.urlopen(url, timeout=5).status,
    "requests": lambda url: requests.get(url, timeout=5).status_code,
    "httpx": lambda url: httpx.get(url, timeout=5).status_code,
}
found = {}
for url in sys.argv[1:]:
    for name, ask in asks.items():
        try:
            found[f"{name} {url}"] = ask(url)
        except Exception as error:
            found[f"{name} {url}"] = type(error).__name__
print(json.dumps([found, left_out]))
"""


class Answering(BaseHTTPRequestHandler):
    """Answers 200 to everything and notes what was asked for."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    running.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def ask(*urls: str, **environment: str) -> tuple[dict[str, int | str], list[str]]:
    kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *urls],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found, left_out = json.loads(done.stdout)
    return found, left_out


@pytest.mark.parametrize(
    "environment",
    [
        {"http_proxy": DEAD},
        {"HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD, "ALL_PROXY": DEAD},
        {"all_proxy": DEAD, "NO_PROXY": "", "no_proxy": "intranet.example"},
        {"http_proxy": "127.0.0.1:9", "NO_PROXY": "[::1],.corp.example"},
        {"http_proxy": DEAD, "no_proxy": "*"},
        {"http_proxy": DEAD, "ALL_PROXY": "socks://127.0.0.1:9"},
        {"http_proxy": "http://127.0.0.1:port", "all_proxy": "socks5://127.0.0.1:9"},
    ],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items()),
)
def test_no_client_asks_a_proxy_for_loopback(server: ThreadingHTTPServer, environment: dict[str, str]) -> None:
    port = server.server_address[1]
    found, _ = ask(f"http://127.0.0.1:{port}/", f"http://localhost:{port}/", **environment)
    assert set(found.values()) == {200}, found
    assert len(server.seen) == 6  # type: ignore[attr-defined]


def test_other_addresses_still_go_through_the_proxy(server: ThreadingHTTPServer) -> None:
    found, left_out = ask("http://elsewhere.example/x", http_proxy=f"http://127.0.0.1:{server.server_address[1]}")
    assert set(found.values()) == {200}, found
    assert server.seen == ["http://elsewhere.example/x"] * 3  # type: ignore[attr-defined]
    assert left_out == []


def test_what_the_user_excepts_stays_excepted() -> None:
    environment = {"NO_PROXY": "a.example, 10.0.0.0/8", "no_proxy": "b.example"}
    reach_loopback_directly(environment)
    assert environment["NO_PROXY"] == environment["no_proxy"]
    assert environment["no_proxy"] == "b.example,a.example,10.0.0.0/8,127.0.0.1,localhost,::1"
    again = dict(environment)
    reach_loopback_directly(again)
    assert again == environment


def test_another_loopback_address_that_the_user_names_is_excepted_too() -> None:
    environment = {"PREFECT_API_URL": "http://127.0.0.7:4200/api", "MLFLOW_TRACKING_URI": "https://mlflow.example"}
    reach_loopback_directly(environment)
    assert environment["NO_PROXY"].split(",")[-1] == "127.0.0.7"
    assert "mlflow.example" not in environment["NO_PROXY"]


def test_a_proxy_that_no_client_can_use_is_left_out_and_named() -> None:
    environment = {"ALL_PROXY": "socks://127.0.0.1:1080", "http_proxy": "http://proxy.example:3128"}
    (line,) = reach_loopback_directly(environment)
    assert line.startswith("ALL_PROXY: no client here speaks socks://")
    assert "Fix: " in line
    assert environment["http_proxy"] == "http://proxy.example:3128"
    assert "ALL_PROXY" not in environment


def test_variables_in_any_case_are_read() -> None:
    environment = {"No_Proxy": "intranet.example", "All_Proxy": "socks://127.0.0.1:1080"}
    (line,) = reach_loopback_directly(environment)
    assert line.startswith("All_Proxy: ")
    assert "All_Proxy" not in environment
    assert environment["no_proxy"] == "intranet.example,127.0.0.1,localhost,::1"


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://127.0.0.1:4200/api", True),
        ("http://localhost:1", True),
        ("http://[::1]:80/", True),
        ("http://127.9.8.7", True),
        ("http://127.1:5000", True),
        ("http://2130706433", True),
        ("http://localhost.:1", True),
        ("http://LocalHost", True),
        ("http://mlflow.localhost", True),
        ("http://[::ffff:127.0.0.1]:5000", True),
        ("http://0.0.0.0:5000", True),
        ("http://128.1", False),
        ("http://notlocalhost", False),
        ("http://[::ffff:10.0.0.1]", False),
        ("http://127.0.0.1.example.com/", False),
        ("http://10.0.0.1", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_loopback_is_known_by_its_address(url: str, own: bool) -> None:
    assert is_loopback(url) is own


def test_a_health_check_asks_no_proxy(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", DEAD)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    assert open_url(f"http://127.0.0.1:{server.server_address[1]}/", timeout_s=5) == 200
