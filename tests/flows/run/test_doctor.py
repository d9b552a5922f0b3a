import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.run import doctor
from flows.run.doctor import Finding, examine, examine_package
from tests.flows.conftest import plain_environment


@pytest.mark.parametrize(
    ("package", "found", "level"),
    [
        ("fastapi", "0.150.9", "ok"),
        ("fastapi", "0.151.0", "fail"),
        ("fastapi", "1.0", "fail"),
        ("sqlalchemy", "2.0.58", "ok"),
        ("sqlalchemy", "2.1.0", "fail"),
        ("sqlalchemy", "2.1.0b2", "fail"),
        ("sqlalchemy", "2.1b1", "fail"),
        ("torch", "9.9", "ok"),
    ],
)
def test_versions_that_break_prefect_in_silence_are_named(
    monkeypatch: pytest.MonkeyPatch, package: str, found: str, level: str
) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: found)
    finding = examine_package(package)
    assert finding.level == level
    if level == "fail":
        assert finding.cure.startswith(f"pip install '{package}<")


def test_a_missing_package_has_a_cure() -> None:
    finding = examine_package("no-such-package-of-anybody")
    assert (finding.level, finding.cure) == ("fail", "pip install -e . -c constraints.txt")


def about(root: Path, what: str) -> Finding:
    (finding,) = (one for one in examine(root) if one.what == what)
    return finding


@pytest.mark.parametrize(("free_mib", "level"), [(100, "fail"), (2_000, "warn"), (50_000, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_mib: int, level: str) -> None:
    class Usage:
        free = free_mib * 2**20

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage)
    assert about(tmp_path, "disk").level == level


def test_a_model_folder_that_is_not_there_is_found(counting_project: Path) -> None:
    params = counting_project / "params.yaml"
    params.write_text(params.read_text() + "model: {source: folder, path: models/own}\n")
    finding = about(counting_project, "params.yaml")
    assert finding.level == "fail"
    assert finding.found.startswith("params.yaml: model.path: ")
    assert finding.cure


def test_a_server_that_does_not_answer_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    prefect = about(tmp_path, "Prefect")
    assert (prefect.level, "PREFECT_API_URL" in prefect.cure) == ("fail", True)
    assert about(tmp_path, "MLflow store").level == "fail"
    assert not any("secret" in finding.found + finding.cure for finding in examine(tmp_path))


def test_a_look_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, counting_project: Path) -> None:
    def broken(path: Path):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor.shutil, "disk_usage", broken)
    findings = examine(counting_project)
    assert Finding(level="fail", what="disk", found="ZeroDivisionError: oh") in findings
    assert {"Python", "GPU", "Prefect"} <= {finding.what for finding in findings}


def run_doctor(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.app", "doctor", *options],
        cwd=project,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_failure_has_a_cure_and_counts(counting_project: Path) -> None:
    done = run_doctor(counting_project, "--json")
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert findings["data"]["level"] == "ok"
    assert findings["DVC remote"]["level"] == "warn"
    assert all(finding["cure"] for finding in findings.values() if finding["level"] != "ok")
    assert {"Python", "fastapi", "sqlalchemy", "disk", "port 4200", "port 5000", "MLflow store", "GPU"} <= set(findings)
    (counting_project / "params.yaml").write_text("sft: {max_stepz: 3}\n")
    (counting_project / "dvc.lock").write_text("")
    broken = run_doctor(counting_project)
    assert broken.returncode == 7
    assert "max_steps" in broken.stdout
    assert "rlhf run --dry-run takes up the last copy" in broken.stdout
