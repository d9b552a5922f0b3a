"""Checkpoints: bit-exact round trips, torn ones set aside, nothing half-written under a final name."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import digest_of, tree_digest
from rlhf_core.state.checkpoint import Checkpointer
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import TrainState

IDENTITY = {"inputs": "a", "parameters": "b"}


def new_state() -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    return TrainState(
        modules={"policy": model},
        optimizers={"policy": torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))},
    )


def train(state: TrainState, until: int) -> None:
    model, optimizer = state.modules["policy"], state.optimizers["policy"]
    while state.step < until:
        x = torch.randn(5, 3, generator=StepRng(0, "test", state.step)("batch"))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state.step += 1
        state.record({"loss/train": loss.item()})


def weights(state: TrainState) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in state.modules["policy"].state_dict().values()]


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resumed_training_ends_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    unbroken = new_state()
    train(unbroken, 8)
    first = new_state()
    first.extra, first.tensors = {"best": 0.1 + 0.2}, {"moment": torch.tensor([1.5])}
    train(first, stop)
    Checkpointer(tmp_path, IDENTITY).save(first)
    resumed = new_state()
    for tensor in resumed.modules["policy"].parameters():
        tensor.data.zero_()
    assert Checkpointer(tmp_path, IDENTITY).restore(resumed)
    assert resumed.extra == {"best": 0.1 + 0.2}
    assert torch.equal(resumed.tensors["moment"], torch.tensor([1.5]))
    train(resumed, 8)
    assert all(torch.equal(a, b) for a, b in zip(weights(unbroken), weights(resumed), strict=True))
    assert resumed.history == unbroken.history


def test_tied_weights_and_bytes_are_stable(tmp_path: Path) -> None:
    state = new_state()
    train(state, 2)
    Checkpointer(tmp_path / "a", IDENTITY).save(state)
    Checkpointer(tmp_path / "b", IDENTITY).save(state)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_nothing_to_restore(tmp_path: Path) -> None:
    assert not Checkpointer(tmp_path / "none", IDENTITY).restore(new_state())


def saved_at(folder: Path, steps: list[int]) -> Checkpointer:
    checkpointer = Checkpointer(folder, IDENTITY, keep=2)
    state = new_state()
    for step in steps:
        train(state, step)
        checkpointer.save(state)
    return checkpointer


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "extra", "manifest"])
def test_a_damaged_newest_one_is_set_aside(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointer = saved_at(tmp_path, [1, 2])
    newest = sorted(tmp_path.glob("step-*"))[-1]
    victim = newest / "module-policy.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-5])
    elif damage == "remove":
        victim.unlink()
    elif damage == "extra":
        (newest / "more.safetensors").write_bytes(b"")
    else:
        (newest / "manifest.json").write_text("{")
    state = new_state()
    assert checkpointer.restore(state)
    assert state.step == 1
    assert (tmp_path / "quarantine" / newest.name).exists()
    assert newest.name in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["state.json", "manifest.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "null", "", "\ufffd{", '{"schema": 3, "files": []}', "[" * 100_000])
def test_where_all_are_damaged_training_begins_again_and_says_so(
    tmp_path: Path, victim: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointer = saved_at(tmp_path, [1, 2])
    for folder in tmp_path.glob("step-*"):
        (folder / victim).write_text(content)
    state = new_state()
    assert not checkpointer.restore(state)
    assert state.step == 0
    told = capsys.readouterr().out
    assert "all of 2 checkpoints are damaged; training begins again at step 0" in told
    assert told.count("set aside in") == 2
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == ["step-000000001", "step-000000002"]
    train(state, 1)
    checkpointer.save(state)
    assert checkpointer.restore(new_state()), "and what it then keeps is found"


@pytest.mark.parametrize("change", [{"files": []}, {"files": None}, {"identity": []}, {"identity": None}])
def test_a_manifest_of_another_form_is_damage_also_where_its_digest_is_right(tmp_path: Path, change: dict) -> None:
    checkpointer = saved_at(tmp_path, [1])
    (path,) = tmp_path.glob("step-*/manifest.json")
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"} | change
    manifest = {name: value for name, value in manifest.items() if value is not None}
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    assert not checkpointer.restore(new_state())


def test_copies_of_checkpoints_under_names_of_ones_own_are_left_alone(tmp_path: Path) -> None:
    """Neither read, nor counted among those to keep, nor removed."""
    checkpointer = saved_at(tmp_path, [1, 2])
    copies = ["step-000000002.bak", "step-000000009 (copy)", "step-best"]
    for name in copies:
        shutil.copytree(tmp_path / "step-000000001", tmp_path / name)
    state = new_state()
    assert checkpointer.restore(state)
    assert state.step == 2
    train(state, 3)
    checkpointer.save(state)
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-000000002", "step-000000003", *copies}


def test_a_digit_of_the_identity_that_was_changed_on_disk_is_damage_and_no_other_identity(tmp_path: Path) -> None:
    checkpointer = saved_at(tmp_path, [1])
    (path,) = tmp_path.glob("step-*/manifest.json")
    content = path.read_text()
    assert '"b"' in content
    path.write_text(content.replace('"b"', '"c"'))
    assert not checkpointer.restore(new_state())


def test_another_identity_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_at(tmp_path, [1])
    with pytest.raises(EnvironmentProblem):
        Checkpointer(tmp_path, {**IDENTITY, "parameters": "other"}).restore(new_state())
    assert "another parameters" in capsys.readouterr().out


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved_at(tmp_path, [1, 2, 3, 4])
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000000003", "step-000000004"]


def test_keeping_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Checkpointer(tmp_path, IDENTITY, keep=1)


def with_frozen_base() -> TrainState:
    state = new_state()
    base, head = state.modules["policy"]
    base.requires_grad_(False)
    head.register_buffer("scale", torch.ones(()))
    state.optimizers = {"policy": torch.optim.AdamW(head.parameters(), lr=0.1)}
    return state


def test_only_what_training_changes_is_written(tmp_path: Path) -> None:
    state = with_frozen_base()
    state.modules["policy"][1].scale.fill_(3.0)
    train(state, 2)
    Checkpointer(tmp_path, IDENTITY).save(state)
    written = load_file(tmp_path / "step-000000002/module-policy.safetensors")
    assert sorted(written) == ["1.bias", "1.scale", "1.weight"]
    resumed = with_frozen_base()
    assert Checkpointer(tmp_path, IDENTITY).restore(resumed)
    assert resumed.modules["policy"][1].scale.item() == 3.0
    train(resumed, 5)
    train(state, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), weights(resumed), strict=True))


def test_other_frozen_weights_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = with_frozen_base()
    Checkpointer(tmp_path, IDENTITY).save(state)
    with torch.no_grad():
        state.modules["policy"][0].weight[0, 0] += 1e-6
    with pytest.raises(EnvironmentProblem, match="none of 1 checkpoints verifies"):
        Checkpointer(tmp_path, IDENTITY).restore(state)
    assert "made on other frozen weights of policy" in capsys.readouterr().out


class SecondProcess:
    """The world as the second of two processes sees it: what the first chose comes from `first`."""

    rank, size = 1, 2

    def __init__(self, first: list[object]) -> None:
        self.first = first

    def collect(self, items: list[object]) -> list[object]:
        return [*self.first, *items]


def test_the_first_process_alone_writes_and_chooses(tmp_path: Path) -> None:
    saved_at(tmp_path, [1, 2, 3])
    second = Checkpointer(tmp_path, IDENTITY, world=SecondProcess([2]))
    state = new_state()
    assert second.restore(state)
    assert state.step == 2, "what the first process chose, not the newest"
    train(state, 7)
    second.save(state)
    assert [path.name[-1] for path in sorted(tmp_path.glob("step-*"))] == ["2", "3"]
    assert not Checkpointer(tmp_path, IDENTITY, world=SecondProcess([None])).restore(state)


KILLED_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import saved_at
saved_at(Path(sys.argv[1]), [1, 2, 3])
"""


@pytest.mark.parametrize("point", ["checkpoint.written", "checkpoint.before_rename", "checkpoint.after_rename"])
def test_a_kill_while_saving_leaves_only_whole_checkpoints(tmp_path: Path, point: str) -> None:
    environment = {**os.environ, "RLHF_FAULT": f"{point}@3:kill", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path), str(Path(__file__).parent)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    for folder in tmp_path.glob("step-*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {**tree_digest(folder), "manifest.json": ""} == {**manifest["files"], "manifest.json": ""}
    state = new_state()
    assert Checkpointer(tmp_path, IDENTITY).restore(state)
    assert state.step == (3 if point == "checkpoint.after_rename" else 2)
    assert not list(tmp_path.glob(".tmp-*")), "what the dead writer left must be swept"


def test_fault_orders_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_core.faults import faultpoint

    monkeypatch.setenv("RLHF_FAULT", "no.such.point:kill")
    with pytest.raises(ValueError, match="unknown fault point"):
        faultpoint("train.step")


def test_a_fault_may_be_meant_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_core.faults import faultpoint

    monkeypatch.setenv("RLHF_FAULT", "train.step#1:raise")
    faultpoint("train.step")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="fault ordered"):
        faultpoint("train.step")


def test_randomness_depends_on_every_part_of_the_address() -> None:
    base = StepRng(1, "sft", 2).integer("batch")
    others = [StepRng(2, "sft", 2), StepRng(1, "ppo", 2), StepRng(1, "sft", 3)]
    assert base == StepRng(1, "sft", 2).integer("batch")
    assert base not in [other.integer("batch") for other in others]
    assert base != StepRng(1, "sft", 2).integer("shuffle")
    assert torch.equal(torch.rand(3, generator=StepRng(1, "s")("a")), torch.rand(3, generator=StepRng(1, "s")("a")))
