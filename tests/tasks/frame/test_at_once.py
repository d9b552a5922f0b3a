"""How many stages side by side: cores, memory, containers, and what the parameters say."""

from pathlib import Path

import pytest

from rlhf_core.config import ComputeConfig, MachineConfig, Params
from tasks import paths
from tasks.frame import at_once as module
from tasks.frame.at_once import at_once, cores, free_bytes, that_fit

GIB = 2**30


@pytest.mark.parametrize(
    ("machine_cores", "width", "free", "need", "fit"),
    [
        (2, 1, 20 * GIB, GIB, 2),
        (2, 2, 20 * GIB, GIB, 1),  # two threads each: one after the other
        (16, 4, 20 * GIB, GIB, 4),
        (16, 1, 20 * GIB, 8 * GIB, 2),  # memory is what is short
        (16, 1, GIB, 8 * GIB, 1),  # never none
        (0.5, 1, 20 * GIB, GIB, 1),
    ],
)
def test_cores_and_memory_both_bound(machine_cores: float, width: int, free: int, need: int, fit: int) -> None:
    assert that_fit(cores=machine_cores, width=width, free_bytes=free, need_bytes=need) == fit


def test_a_containers_share_of_the_machine_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * GIB - 4096}\n")
    assert cores(tmp_path) == 0.5
    assert free_bytes(tmp_path) == 4096
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert cores(tmp_path) >= 1
    assert free_bytes(tmp_path) > 4096
    assert cores(tmp_path / "none") >= 1


def test_a_bigger_model_leaves_room_for_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)
    monkeypatch.setattr(module, "free_bytes", lambda: 8 * GIB)
    params = Params(compute=ComputeConfig(device="cpu"))
    assert at_once(params, tmp_path) == 8
    weights = tmp_path / paths.SFT / "model/model.safetensors"
    weights.parent.mkdir(parents=True)
    with weights.open("wb") as file:
        file.truncate(GIB // 4)
    assert at_once(params, tmp_path) == 2
    assert at_once(Params(compute=ComputeConfig(device="cpu", threads=8)), tmp_path) == 1
    assert at_once(Params(machine=MachineConfig(at_once=5)), tmp_path) == 5


def test_stages_that_share_a_gpu_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)
    (tmp_path / "gpus/0000:00:04.0").mkdir(parents=True)
    monkeypatch.setattr(module, "GPUS", tmp_path / "gpus")
    assert at_once(Params(compute=ComputeConfig(device="auto")), tmp_path) == 1
    assert at_once(Params(compute=ComputeConfig(device="cpu")), tmp_path) > 1
