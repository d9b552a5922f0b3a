"""The Prefect server on a real PostgreSQL, as the docs say; left out, and said so, where none is installed."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from support.timing import patience

from flows.local.ports import free_port
from flows.local.servers import stop_servers
from tests.flows.conftest import plain_environment

SETTING = "PREFECT_SERVER_DATABASE_CONNECTION_URL"


def programs() -> Path | None:
    """Where `initdb` is: on the path, or where Debian puts it."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        programs() is None,
        reason="LEFT OUT: no PostgreSQL here (Debian: apt-get install postgresql), nothing was tested",
    ),
]


@pytest.fixture
def database() -> Iterator[str]:
    """Address of an empty database of the test's own; PostgreSQL refuses to run as root."""
    bin_folder, port = programs(), free_port(0)
    assert bin_folder is not None
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="rlhf-pg-"))
    if user:
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        # no pipe: the server that pg_ctl starts would hold it open
        with (folder.parent / f"{folder.name}.out").open("a") as output:
            subprocess.run(
                command, cwd=folder, user=user, check=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    control = (str(bin_folder / "pg_ctl"), "-D", str(folder / "db"), "-w", "-t", str(int(patience(60))))
    run(str(bin_folder / "initdb"), "-D", str(folder / "db"), "-U", "prefect", "--auth=trust", "--no-sync")
    run(*control, "-o", f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off", "-l", "log", "start")
    try:
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        run(*control, "-m", "immediate", "stop")
        shutil.rmtree(folder)
        (folder.parent / f"{folder.name}.out").unlink()


def rows(address: str, query: str) -> list[tuple]:
    async def ask() -> list[tuple]:
        connection = await asyncpg.connect(address.replace("+asyncpg", ""))
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return asyncio.run(ask())


def test_a_run_is_kept_in_postgresql(counting_project: Path, database: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.app", "run", "--json"],
            cwd=counting_project,
            env=plain_environment(**{SETTING: database}),
            capture_output=True,
            text=True,
            timeout=patience(240),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        run = json.loads(done.stdout)
        assert rows(database, "SELECT name, state_type::text FROM flow_run") == [(run["run"], "COMPLETED")]
        tasks = rows(database, "SELECT name, state_type::text FROM task_run")
        assert sorted(tasks) == [(name, "COMPLETED") for name in ("first", "second@dpo", "second@ppo")]
        assert {"first-metrics", "run-summary"} <= {key for (key,) in rows(database, "SELECT key FROM artifact")}
        assert not list((counting_project / ".rlhf/prefect").glob("*.db")), "nothing lies in SQLite beside it"
    finally:
        stop_servers(counting_project)
