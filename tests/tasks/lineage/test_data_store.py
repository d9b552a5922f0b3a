"""A fresh clone restores data/ from the store in the repository, with no network."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_pull_restores_data_from_the_files_in_the_repository(tmp_path: Path) -> None:
    for name in (".dvc/config", ".dvc/.gitignore", "data.dvc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / ".dvcstore", tmp_path / ".dvcstore")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    # Proxies that lead nowhere: a request would fail.
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
    }  # fmt: skip
    command = [sys.executable, "-m", "dvc", "pull", "-q"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {
        "README.md", "demonstrations.jsonl", "prompts.jsonl", "heldout_prompts.jsonl", "graded.jsonl", "votes.jsonl",
    }  # fmt: skip
    assert len((tmp_path / "data/demonstrations.jsonl").read_text().splitlines()) == 6600
