"""`benchmarks/gpu.sh` gives a table whatever fails, in its time; its parts run, tiny, on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import Part, run_part

ROOT = Path(__file__).parents[2]
GOOD = "import json; print('words'); print(json.dumps({'text': 'all is well | so'}))"
BAD = "import json, sys; print(json.dumps({'text': 'half'})); print('it broke', file=sys.stderr); sys.exit(3)"
LONG = "import time; time.sleep(60)"


def part(name: str, code: str, limit_s: float = 30) -> Part:
    return Part(name=name, title=f"the {name} one", command=("-c", code), limit_s=limit_s)


def test_a_table_comes_out_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "LEAST_S", 0.5)
    chosen = [part("good", GOOD), part("bad", BAD), part("long", LONG, 2), part("next", GOOD)]
    monkeypatch.setattr(gpu, "parts", lambda cache, pretend: chosen)
    start = time.monotonic()
    assert gpu.main(["--pretend"]) == 1
    assert time.monotonic() - start < 20
    rows = [line for line in (tmp_path / "out/gpu-pretend.md").read_text().splitlines() if line.startswith("| the")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [cell[1] for cell in cells] == ["done", "failed", "timed out", "done"]
    assert cells[0][3] == "all is well / so"
    assert cells[1][3] == "half · it broke"
    found = json.loads((tmp_path / "out/gpu-pretend.json").read_text())["parts"]
    assert found["next"]["figures"] == {"text": "all is well | so"}
    assert "it broke" in (tmp_path / "out/gpu-pretend.log").read_text()
    assert "timed out" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 3, "few files, for machines that give back few"


def test_the_budget_holds_for_all_parts_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "LEAST_S", 0.5)
    monkeypatch.setattr(gpu, "parts", lambda cache, pretend: [part("long", LONG), part("good", GOOD)])
    start = time.monotonic()
    assert gpu.main(["--budget", "2"]) == 1
    assert time.monotonic() - start < 10
    states = {name: one["state"] for name, one in json.loads((tmp_path / "gpu.json").read_text())["parts"].items()}
    assert states == {"long": "timed out", "good": "not run"}


def test_nothing_of_a_part_outlives_it(tmp_path: Path) -> None:
    marker = f"import time  # {tmp_path}\ntime.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {marker!r}]); time.sleep(60)"
    assert run_part(part("long", code, 3), 30, tmp_path / "log").state == "timed out"
    time.sleep(0.5)
    running = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    left = []
    for path in running:
        try:
            command = path.read_bytes().decode(errors="replace")
            state = path.with_name("stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        left += [command] if str(tmp_path) in command and state != "Z" else []
    assert not left


def test_the_parts_of_a_gpu_and_of_a_cpu_are_the_same_commands() -> None:
    on_gpu, on_cpu = (gpu.parts(Path("cache"), pretend=pretend) for pretend in (False, True))
    assert {one.command[:3] for one in on_cpu} == {one.command[:3] for one in on_gpu}
    assert all("cuda" in one.command for one in on_gpu)
    assert all("cpu" in one.command for one in on_cpu)
    sizes = {one.name for one in on_gpu}
    assert {"decode L", "decode XL", "ppo XL", "ppo_lora XL", "sft L", "dpo XL", "sampling XL"} <= sizes


def test_the_script_runs_from_anywhere_with_the_python_that_it_is_given(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "--pretend", "--only", "machine", "resume"],
        cwd=tmp_path, env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed by signal 9, resumed at step 3: same bytes: True" in (tmp_path / "gpu-pretend.md").read_text()


@pytest.mark.parametrize("name", ["exact", "decode", "ppo_lora"])
def test_a_part_runs_on_a_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "CACHE", tmp_path)
    monkeypatch.setattr("benchmarks.rates.COPIED_MB", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr("benchmarks.ours_rollouts.NEW_TOKENS", 8)
    figures = gpu_parts.PARTS[name]("cpu", "tiny")
    match name:
        case "exact":
            assert set(figures["differences"].values()) == {0.0}
            assert len(figures["differences"]) == 4
        case "decode":
            assert figures["graphs"] > 0
            assert figures["same"]
            assert figures["why_not"] is None
        case _:
            assert figures["tokens"] > 0
            assert figures["peak_mb"] > 0


def test_a_promise_that_does_not_hold_fails_its_part_with_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parts, "FIRSTS", {"DPO": lambda *_: 0.0, "PPO": lambda *_: 1e-7})
    assert gpu_parts.main(["exact", "--device", "cpu", "--size", "tiny"]) == 1
    assert json.loads(capsys.readouterr().out)["differences"]["PPO bfloat16"] == 1e-7
