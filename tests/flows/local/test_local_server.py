"""The local Prefect server as it really starts: who may talk to it, and who ends it."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.timing import patience

from flows.local import servers
from flows.local.ports import usual_ports
from flows.local.prefect_server import OwnPageOnly
from flows.local.servers import Server, ensure_prefect, known_servers, stop_servers
from rlhf_core.errors import EnvironmentProblem
from tasks.frame.locks import boot_id
from tasks.frame.runner import group_members
from tasks.frame.watchdog import process_start
from tests.flows.conftest import plain_environment

ROOT = Path(__file__).parents[3]


def ask(url: str, *, method: str = "GET", body: object = None, headers: dict[str, str] | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=patience(10)) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.integration
def test_only_the_own_page_is_answered(served_project: Path) -> None:
    server = known_servers(served_project)["prefect"]
    assert ask(f"{server.url}/api/health")[0] == 200
    status, headers, _ = ask(f"{server.url}/api/health", headers={"Origin": server.url})
    assert status == 200
    assert headers.get("access-control-allow-origin") == server.url
    for strange in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        status, headers, _ = ask(f"{server.url}/api/health", headers=strange)
        assert status == 403
        assert "access-control-allow-origin" not in {name.lower() for name in headers}
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert ask(f"{server.url}/api/flows/filter", method="OPTIONS", headers=preflight)[0] == 403


@pytest.mark.integration
def test_changes_need_a_token_against_forged_requests(served_project: Path) -> None:
    url = known_servers(served_project)["prefect"].url
    headers = {"Content-Type": "application/json"}
    status, _, body = ask(f"{url}/api/flows/", method="POST", body={"name": "forged"}, headers=headers)
    assert status == 403
    assert b"CSRF" in body
    token = json.loads(ask(f"{url}/api/csrf-token?client=me")[2])["token"]
    proof = headers | {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "me"}
    assert ask(f"{url}/api/flows/", method="POST", body={"name": "honest"}, headers=proof)[0] == 201


@pytest.mark.integration
def test_settings_of_the_running_server_are_safe(served_project: Path) -> None:
    server = known_servers(served_project)["prefect"]
    settings = json.loads(ask(f"{server.url}/api/admin/settings")[2])
    assert settings["server"]["api"]["csrf_protection_enabled"] is True
    assert settings["server"]["api"]["cors_allowed_origins"] == server.url
    assert settings["server"]["analytics_enabled"] is False
    assert settings["results"]["default_serializer"] == "json"
    assert Path(settings["home"]) == served_project / ".rlhf/prefect"
    listening = Path("/proc/net/tcp").read_text()
    assert f"0100007F:{server.port:04X}" in listening
    assert f"00000000:{server.port:04X}" not in listening


@pytest.mark.integration
def test_a_running_server_is_used_again(served_project: Path) -> None:
    before = known_servers(served_project)["prefect"]
    assert ensure_prefect(served_project) == before


@pytest.mark.integration
def test_mlflow_and_all_servers_go_up_and_down(counting_project: Path) -> None:
    def rlhf(*arguments: str) -> str:
        command = [sys.executable, "-m", "flows.cli.app", *arguments]
        done = subprocess.run(
            command, cwd=counting_project, env=plain_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        up = {server["name"]: server for server in json.loads(rlhf("up", "--json"))}
        assert set(up) == {"prefect", "worker", "mlflow"}
        url = up["mlflow"]["url"]
        make, page = f"{url}/api/2.0/mlflow/experiments/create", {"Content-Type": "application/json"}
        assert ask(make, method="POST", body={"name": "own"}, headers=page | {"Origin": url})[0] == 200
        for strange in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            assert ask(make, method="POST", body={"name": "forged"}, headers=page | strange)[0] == 403
        pages = json.loads(rlhf("ui", "--json"))
        assert pages["prefect"] == up["prefect"]["url"]
        assert pages["mlflow"] == f"{url}/#/experiments/1/runs?workflowType=machine_learning"
        again = {server["name"]: server["pid"] for server in json.loads(rlhf("up", "--json"))}
        assert again == {name: server["pid"] for name, server in up.items()}
    finally:
        ended = json.loads(rlhf("down", "--json"))
    assert set(ended) == {"prefect", "worker", "mlflow"}
    assert not any(group_members(server["pid"]) for server in up.values())
    ports = {name: int(up[name]["url"].rpartition(":")[2]) for name in ("prefect", "mlflow")}
    assert usual_ports(counting_project) == ports, "links live on when the servers are started again"


def test_a_busy_server_is_waited_for_and_a_dead_one_is_not(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer that does not come is no reason to end a server and the runs that it serves."""
    note(tmp_path, sleeper)
    answers = iter([False, False, True])
    monkeypatch.setattr(servers, "answers", lambda url: next(answers))
    monkeypatch.setattr(servers.sys, "executable", "/bin/false")  # what is started in its place ends at once
    found = servers.ensure_mlflow(tmp_path)
    assert found.pid == sleeper.pid
    assert sleeper.poll() is None
    monkeypatch.setattr(servers, "answers", lambda url: False)
    monkeypatch.setattr(servers, "ANSWER_SECONDS", 0.5)
    with pytest.raises(EnvironmentProblem, match="does not come up"):
        servers.ensure_mlflow(tmp_path)
    assert sleeper.wait(timeout=patience(5)) != 0


@pytest.mark.integration
def test_a_proxy_in_the_environment_does_not_touch_a_healthy_server(served_project: Path) -> None:
    before = known_servers(served_project)["prefect"]
    code = "from pathlib import Path; from flows.local import servers; print(servers.ensure_prefect(Path.cwd()).pid)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=served_project,
        env=plain_environment(http_proxy="http://127.0.0.1:9", NO_PROXY="", no_proxy="", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=patience(30),
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (str(before.pid), "")
    assert known_servers(served_project)["prefect"] == before


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def note(home: Path, process: subprocess.Popen[bytes], **change: str) -> None:
    server = Server(
        name="mlflow",
        pid=process.pid,
        process_start=change.get("process_start") or process_start(process.pid) or "",
        boot=change.get("boot") or boot_id(),
        port=1,
        log="x.log",
    )
    (home / ".rlhf").mkdir()
    (home / servers.STATE_FILE).write_text(json.dumps({"mlflow": server.model_dump()}))


def test_own_processes_are_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    note(tmp_path, sleeper)
    assert stop_servers(tmp_path) == ["mlflow"]
    assert sleeper.wait(timeout=patience(5)) != 0
    assert known_servers(tmp_path) == {}


@pytest.mark.parametrize("change", [{"process_start": "1"}, {"boot": "another"}])
def test_strangers_with_our_pid_are_left_alone(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], change: dict[str, str]
) -> None:
    note(tmp_path, sleeper, **change)
    assert known_servers(tmp_path) == {}
    assert stop_servers(tmp_path) == []
    assert sleeper.poll() is None


async def answer_of(headers: list[tuple[bytes, bytes]], kind: str = "http") -> list[dict]:
    async def app(scope, receive, send) -> None:
        await send({"type": "passed"})

    sent: list[dict] = []

    async def send(message) -> None:
        sent.append(message)

    await OwnPageOnly(app, 4200)({"type": kind, "headers": headers}, None, send)  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ([(b"host", b"127.0.0.1:4200")], True),
        ([(b"Host", b"localhost:4200"), (b"origin", b"http://localhost:4200")], True),
        ([(b"host", b"127.0.0.1:4201")], False),
        ([(b"host", b"rebound.example:4200")], False),
        ([], False),
        ([(b"host", b"127.0.0.1:4200"), (b"host", b"evil.example")], False),
        ([(b"host", b"127.0.0.1:4200"), (b"origin", b"http://evil.example")], False),
        ([(b"host", b"127.0.0.1:4200"), (b"origin", b"null")], False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_host_and_origin_are_checked(headers: list[tuple[bytes, bytes]], passes: bool, kind: str) -> None:
    import asyncio

    sent = asyncio.run(answer_of(headers, kind))
    if passes:
        assert sent == [{"type": "passed"}]
    elif kind == "http":
        assert sent[0]["status"] == 403
    else:
        assert sent == [{"type": "websocket.close", "code": 1008}]
