"""A whole run of the benchmarks at a size that takes no time; its figures mean nothing, that they are there does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import pretend_gpu
from support.tokenizer import byte_level
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import __main__ as command
from benchmarks.clock import Clock
from benchmarks.worker import TASKS, Setting, measure
from benchmarks.workload import make_pairs, subject_of
from rlhf_core.state.compute_mode import compute_mode, set_compute_mode

OURS = ["sft", "reward", "dpo", "sampling", "ppo-shared"]
SHORT = ["--pairs", "1", "--steps", "1", "--warmup", "1", "--rows", "2"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Workers without a process of their own, and without TRL."""
    threads, mode = torch.get_num_threads(), compute_mode()
    monkeypatch.setattr(command, "run_worker", lambda setting, limit_s: measure(setting))
    monkeypatch.setattr("benchmarks.rates.TIMED_S", 0.001)
    monkeypatch.setattr("benchmarks.rates.COPIED_MB", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr("benchmarks.rates.TOKENS", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr("benchmarks.worker.installed", lambda module: False)
    monkeypatch.setattr("benchmarks.ours_rollouts.NEW_TOKENS", 8)
    yield
    torch.set_num_threads(threads)
    set_compute_mode(mode)


def test_ours_is_measured_alone_where_there_is_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["trl", "--size", "tiny", *SHORT, "--cache", str(tmp_path), "--tasks", *OURS])
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
def pretrained(tmp_path: Path) -> Path:
    """A folder as others save it: byte-level BPE, padding that is the end, grouped queries, tied embeddings."""
    tokenizer = byte_level()
    tokenizer.eos_token = tokenizer.pad_token = "<|end|>"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path / "somebodys"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pretrained_model_is_measured_as_it_is(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--responses", "4", "--rollouts", "2", "1", "--cache", str(tmp_path)]
    command.main(
        ["trl", "--model", str(pretrained), *SHORT, *few, "--tasks", "sft", "sft-lora", "ppo-fixed", "sampling"]
    )
    out = capsys.readouterr().out
    assert "Size somebodys (hidden 32, layers 2, heads 4, intermediate 64, vocabulary 317, kv_heads 2)" in out
    assert str(tmp_path) not in out, "no path of this machine in a table"
    kept = json.loads((tmp_path / "trl-somebodys.json").read_text())
    figures = {task: pairs[0]["ours"] for task, pairs in kept["tasks"].items()}
    assert figures["sampling"]["tokens"] == 2 * 4 * 8
    assert figures["sft-lora"]["loss_first"] == figures["sft"]["loss_first"], "the same rows, adapters that do nothing"
    assert figures["sft-lora"]["flop_per_token"] == pytest.approx(figures["sft"]["flop_per_token"] * 2 / 3)


def test_rows_of_a_pretrained_model_are_text_that_it_reads_as_the_same_tokens(pretrained: Path) -> None:
    subject, tokenizer = subject_of(str(pretrained), pretrained), AutoTokenizer.from_pretrained(pretrained)
    assert (subject.end, subject.pad, subject.size.kv_width) == (1, 1, 16)
    for pair in make_pairs(20, subject, seed=0):
        for ids in (pair.prompt, pair.chosen):
            assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
        assert pair.chosen.index(subject.end) == len(pair.chosen) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": ["ppo-ending"]}, "ppo-ending: only with --size"), ({"type": "qwen2"}, "a qwen2; the benchmarks count")],
)
def test_what_a_pretrained_model_cannot_show_is_refused(
    pretrained: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps(config | {"model_type": change.get("type", "llama")}))
    subject_of.cache_clear()
    with pytest.raises(SystemExit, match=message):
        command.main(
            ["trl", "--model", str(pretrained), "--cache", str(tmp_path), "--tasks", *change.get("tasks", ["sft"])]
        )


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
