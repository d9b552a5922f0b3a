"""Two processes take the steps that one takes: all trainers, whole and divided (FSDP), unbroken and resumed.

Real processes under torchrun and gloo, started once for all cases. Bounds: 1e-6, absolute, on every weight after the
last step; 1e-6 relative on every loss of every step and 1e-5 on every gradient norm (1e-6 absolute near zero).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import parallel_jobs as jobs
from torch import Tensor

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
PLAIN = ("sft", "sft_lora", "sft_dora", "dpo", "reward", "ppo")
DIVIDED = (*PLAIN, "sft_lonely", "dpo_capped")
MORE = ("ppo_remembering", *jobs.LOSSES)
ORDERS = (
    *PLAIN,
    *(f"{name}+sharded" for name in PLAIN),
    *(f"{name}+broken" for name in PLAIN),
    *(f"{name}+sharded+broken" for name in PLAIN),
    "sft_lonely",
    "sft_lonely+sharded",
    "dpo_capped+sharded",
    "ppo_once+sharded",
    *MORE,
    *(f"{name}+broken" for name in MORE),
)


def launch(folder: Path, processes: int, *orders: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(Path(jobs.__file__)), str(folder), *orders],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every order."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, 2, *ORDERS)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def outcome(folder: Path, order: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    return load_file(folder / order / "weights.safetensors"), json.loads((folder / order / "history.json").read_text())


@pytest.fixture(scope="session")
def one_process() -> Any:
    """What this process alone makes of a job; each job once."""
    known: dict[str, tuple[dict[str, Tensor], list[dict[str, float]]]] = {}

    def run(name: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        if name not in known:
            state = jobs.finish(name)
            known[name] = jobs.weights(state), state.history
        return known[name]

    return run


def assert_same_training(one: Any, two: Any) -> None:
    (weights, history), (others, other_history) = one, two
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert (others[name] - tensor).abs().max().item() < 1e-6, name
    assert len(history) == len(other_history)
    for row, other in zip(history, other_history, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if not key.startswith(("loss/", "optim/")):
                continue  # shares of rows may jump where two numbers are all but equal
            bound = 1e-6 if key.startswith("loss/") else 1e-5  # gradient norms too: Adam would hide a wrong scale
            assert other[key] == pytest.approx(row[key], rel=bound, abs=1e-6), f"step {row['step']}: {key}"


@pytest.mark.parametrize("name", [*PLAIN, "sft_lonely", *MORE])
def test_n25_two_processes_with_half_the_rows_equal_one_with_all(
    two_processes: Path, one_process: Any, name: str
) -> None:
    weights, _ = one_process(name)
    start, _ = jobs.begin(name, sharded=False)
    moved = max((weights[key] - tensor).abs().max().item() for key, tensor in jobs.weights(start).items())
    assert moved > 1e-4, "the training that is compared must have moved the weights by more than the bound"
    assert_same_training(one_process(name), outcome(two_processes, name))


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_weights_train_as_whole_ones(two_processes: Path, one_process: Any, name: str) -> None:
    assert_same_training(one_process(name), outcome(two_processes, f"{name}+sharded"))


@pytest.mark.parametrize("name", ["dpo", "dpo_capped"])
def test_n32_divided_weights_begin_at_exactly_ln_2(two_processes: Path, name: str) -> None:
    """Policy and frozen reference take the same way through the same kernels, packed or transformers' own."""
    first = outcome(two_processes, f"{name}+sharded")[1][0]
    assert first["loss/preference"] == torch.tensor(2.0).log().item()
    assert first["implicit_reward/margin"] == 0.0


def test_n04_divided_weights_begin_at_a_log_ratio_of_exactly_0(two_processes: Path) -> None:
    first = outcome(two_processes, "ppo_once+sharded")[1][0]
    assert (first["policy/ratio_max"], first["policy/approx_kl"], first["policy/updates"]) == (1.0, 0.0, 1)


@pytest.mark.parametrize(
    ("name", "how"), [*((one, how) for one in PLAIN for how in ("", "+sharded")), *((m, "") for m in MORE)]
)
def test_n41_broken_off_and_resumed_two_processes_end_with_the_same_bits(
    two_processes: Path, name: str, how: str
) -> None:
    weights, history = outcome(two_processes, name + how)
    others, other_history = outcome(two_processes, f"{name}{how}+broken")
    assert all(torch.equal(tensor, others[key]) for key, tensor in weights.items())
    assert history == other_history


def test_a_checkpoint_of_divided_weights_has_them_whole(two_processes: Path) -> None:
    """The files of both runs hold tensors of the same names and shapes, and nearly the same numbers."""
    (whole,), (divided,) = (
        list((two_processes / f"sft{how}+broken-checkpoints").glob("step-000000002")) for how in ("", "+sharded")
    )
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert files == sorted(path.name for path in divided.glob("*.safetensors"))
    for file in files:
        one, other = load_file(whole / file), load_file(divided / file)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-6)


def test_sums_are_the_same_everywhere_and_every_time(two_processes: Path, tmp_path: Path) -> None:
    """Three processes, where the order of a sum can differ; `check_the_world` runs in each."""
    done = launch(tmp_path, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    three, two = (json.loads((folder / "world.json").read_text()) for folder in (tmp_path, two_processes))
    assert (three["size"], three["ranks"]) == (3, [3, 3])
    assert (two["size"], two["ranks"]) == (2, [1, 2])
