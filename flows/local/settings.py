"""Settings of the servers and of every process that talks to them; the only place where they stand."""

import os
from pathlib import Path

from tasks import paths

POOL = "rlhf"
QUEUE = "pipeline"
GPU_TAG = "gpu"
PREFECT_HOME = paths.STATE / "prefect"
NOT_TRACKED = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


def prefect_settings(home: Path, port: int | None) -> dict[str, str]:
    """Environment of the local Prefect server, its worker, and its clients.

    Prefect's own defaults allow any origin, switch request forgery protection off and pickle results. Here only the
    server's own page may call it, results are JSON, and nothing is reported to anybody.
    """
    origin = f"http://127.0.0.1:{port}"
    return {
        **NOT_TRACKED,
        "PREFECT_HOME": str(home / PREFECT_HOME),
        "PREFECT_PROFILES_PATH": str(home / PREFECT_HOME / "profiles.toml"),
        "PREFECT_API_URL": f"{origin}/api",
        "PREFECT_UI_API_URL": f"{origin}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origin,
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_DATABASE_TIMEOUT": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "3",  # who starts a run from the form waits for it
        **client_settings(),
    }


def client_settings() -> dict[str, str]:
    """Environment of a process that runs flows, whatever server it talks to: JSON results or none, a quiet console."""
    return {
        **NOT_TRACKED,
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
        "PREFECT_TASKS_DEFAULT_PERSIST_RESULT": "false",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_CLI_WRAP_LINES": "false",
    }


def users_server() -> str | None:
    """Address of a Prefect API that the user chose by `PREFECT_API_URL`; then no local server is started."""
    return os.environ.get("PREFECT_API_URL") or None


def api_address() -> str:
    """Address of the Prefect API that this process talks to."""
    return users_server() or "the local Prefect server"


def mlflow_settings(uri: str) -> dict[str, str]:
    """Environment of the MLflow server. The address may hold a password, so it is not among the arguments."""
    return {
        **NOT_TRACKED,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that nothing here would use
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }
