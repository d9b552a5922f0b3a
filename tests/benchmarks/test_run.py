"""A whole run of the benchmarks at a size that takes no time; its figures mean nothing, that they are there does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import pretend_gpu

from benchmarks import __main__ as command
from benchmarks.clock import Clock
from benchmarks.worker import TASKS, Setting, measure
from rlhf_core.state.compute_mode import compute_mode, set_compute_mode

OURS = ["sft", "reward", "dpo", "sampling", "ppo-shared"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Workers without a process of their own, and without TRL."""
    threads, mode = torch.get_num_threads(), compute_mode()
    monkeypatch.setattr(command, "run_worker", measure)
    monkeypatch.setattr("benchmarks.rates.TIMED_S", 0.001)
    monkeypatch.setattr("benchmarks.rates.COPIED_MB", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr("benchmarks.rates.TOKENS", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr("benchmarks.worker.installed", lambda module: False)
    monkeypatch.setattr("benchmarks.ours_rollouts.NEW_TOKENS", 8)
    yield
    torch.set_num_threads(threads)
    set_compute_mode(mode)


def test_ours_is_measured_alone_where_there_is_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--size", "tiny", "--pairs", "1", "--steps", "1", "--warmup", "1", "--rows", "2"]
    command.main(["trl", *wanted, "--cache", str(tmp_path), "--tasks", *OURS])
    out = capsys.readouterr()
    for task in OURS:
        assert f"{task}: ours alone, " in out.err
        assert f"| {TASKS[task].title} | " in out.out
    assert "not measured: trl and datasets not installed" in out.out
    kept = json.loads((tmp_path / "trl-tiny.json").read_text())
    assert kept["setting"]["device"] == "cpu"
    figures = {task: pairs[0]["ours"] for task, pairs in kept["tasks"].items()}
    assert all(one["tokens"] > 0 and one["wall_s"] > 0 and one["peak_mb"] > 0 for one in figures.values())
    assert figures["dpo"]["model_flop_per_token"] > figures["dpo"]["flop_per_token"] > 0
    assert figures["sampling"]["bytes_per_token"] > 0
    assert (tmp_path / "trl-tiny.md").read_text() in out.out


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator and the driver of a GPU are asked, in order; 3 MiB at most, 1 MiB now."""
    asked: list[str] = []
    answers = {"max_memory_allocated": 3 * 2**20, "memory_allocated": 2**20}
    for name in ("synchronize", "reset_peak_memory_stats", *answers):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name) or answers.get(name))
    return asked


def test_the_clock_reads_after_the_gpu_has_done_its_work(counts: list[str]) -> None:
    clock = Clock(1, "cuda")
    clock.begin()
    begun = len(counts)
    clock.tick(5)
    clock.tick(7)
    assert counts[:begun] == ["memory_allocated", "reset_peak_memory_stats", "synchronize"]
    assert counts[begun:] == ["synchronize", "synchronize", "max_memory_allocated"]
    assert clock.figures()["tokens"] == 7


@pytest.mark.parametrize("task", ["dpo", "sampling"])
def test_the_way_of_a_gpu_runs_on_a_pretend_one(tmp_path: Path, counts: list[str], task: str) -> None:
    """The same tasks with `--device cuda`: bfloat16 and synchronised clocks, memory by the allocator's count."""
    setting = Setting(
        task=task, side="ours", size="tiny", steps=1, warmup=1, rows=2, threads=1, seed=0, cache=str(tmp_path)
    )
    with pretend_gpu() as waits:
        found = measure(replace(setting, device="cuda"))
    assert waits.total(), "the model lay on the GPU"
    assert compute_mode().precision == "bfloat16"
    assert (found["held_mb"], found["peak_mb"]) == (1.0, 3.0)
    assert found["tokens"] == measure(setting)["tokens"]
    assert "synchronize" in counts


def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"torch sees no GPU\. Fix: [^\n]*$"):
        command.main(["trl", "--device", "cuda"])
