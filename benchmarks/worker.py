"""One measured process: `python -m benchmarks.worker '<setting as JSON>'` prints its figures as a line of JSON.

A task is a pair of functions `(setting, clock) -> extra figures`, ours and the peer's, named in `TASKS`. A new task
is one line there.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clock import Clock
from benchmarks.workload import Subject, subject_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What one process is to measure.

    Attributes:
        task: key of `TASKS`.
        side: `ours` or `trl`.
        size: key of `workload.SIZES`, or the folder of a pretrained Llama.
        steps: counted steps, after `warmup` others.
        rows: examples a step: demonstrations, pairs.
        responses: of a rollout, and as many written at once.
        threads: CPU threads of torch.
        seed: of the data.
        cache: folder for models.
        device: cpu, in float32, or cuda, in bfloat16.
    """

    task: str
    side: str
    size: str
    steps: int
    warmup: int
    rows: int
    threads: int
    seed: int
    cache: str
    responses: int = 64
    device: str = "cpu"

    @property
    def subject(self) -> Subject:
        """The model and what its rows are made of."""
        return subject_of(self.size, Path(self.cache))

    @property
    def num_steps(self) -> int:
        """Steps, warm-up included."""
        return self.steps + self.warmup

    @property
    def num_rows(self) -> int:
        """Rows of one pass in which every step is full."""
        return self.num_steps * self.rows


Work = Callable[[Setting, Clock], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A row of the table.

    Attributes:
        title: what it is called there.
        ours, trl: `module:function` of each side.
        bars: least ratio of tokens a CPU-second, by size.
        memory_bar: largest ratio of peak memory.
        matmul_bars: least share of the measured matmul rate, by size; empty where the formula of `flops` has none.
        rounds: counted steps and warm-up of a run where these are whole rollouts and not what was asked for.
        ends: whether responses end by themselves, which the model is changed for; a pretrained one is not.
        needs: environment variable without which the peer cannot run.
        modules: what the peer imports; where one is not installed ours is measured alone.
    """

    title: str
    ours: str
    trl: str
    bars: dict[str, float]
    memory_bar: float
    matmul_bars: dict[str, float]
    rounds: tuple[int, int] | None = None
    ends: bool = False
    needs: str | None = None
    modules: tuple[str, ...] = ("trl", "datasets")

    def no_peer(self) -> str | None:
        """Why the peer cannot run here; None where it can."""
        if self.needs and self.needs not in os.environ:
            return f"{self.needs} does not say where TRL 1.12 lies"
        missing = [name for name in self.modules if not installed(name)]
        return f"{' and '.join(missing)} not installed" if missing else None


def installed(module: str) -> bool:
    """Whether a module could be imported."""
    return importlib.util.find_spec(module) is not None


TRL_PPO = "BENCHMARK_TRL_PPO"
"""Names the folder with TRL 1.12, see `benchmarks/peer_ppo.py`."""


def _ppo(title: str, ours: str, trl: str, bars: dict[str, float], *, ends: bool = True) -> Task:
    return Task(
        title=title,
        ours=f"benchmarks.ours_rollouts:{ours}",
        trl=f"benchmarks.peer_ppo:{trl}",
        bars=bars,
        memory_bar=1.0,
        matmul_bars={},
        rounds=(3, 1),
        ends=ends,
        needs=TRL_PPO,
    )


TASKS = {
    "sft": Task(
        title="SFT",
        ours="benchmarks.ours:sft",
        trl="benchmarks.peer_trl:sft",
        bars={"S": 1.8, "M": 1.6},
        memory_bar=0.5,
        matmul_bars={"S": 0.6, "M": 0.75},
    ),
    "sft-lora": Task(
        title="SFT, LoRA of rank 16 on all linear layers",
        ours="benchmarks.ours:sft_lora",
        trl="benchmarks.peer_trl:sft_lora",
        bars={"S": 1.0, "M": 1.0},
        memory_bar=1.0,
        matmul_bars={},
        modules=("trl", "datasets", "peft"),
    ),
    "reward": Task(
        title="reward model",
        ours="benchmarks.ours:reward",
        trl="benchmarks.peer_trl:reward",
        bars={"S": 1.5, "M": 1.5},
        memory_bar=0.5,
        matmul_bars={"S": 0.6, "M": 0.75},
    ),
    "dpo": Task(
        title="DPO",
        ours="benchmarks.ours:dpo",
        trl="benchmarks.peer_trl:dpo",
        bars={"S": 1.9, "M": 1.9},
        memory_bar=0.5,
        matmul_bars={"S": 0.6, "M": 0.75},
    ),
    "sampling": Task(
        title="sampling responses of 64 tokens (peer: `generate`)",
        ours="benchmarks.ours_rollouts:sampling",
        trl="benchmarks.peer_generate:generate",
        bars={"S": 2.5, "M": 2.0},
        memory_bar=1.0,
        matmul_bars={},
        rounds=(4, 1),
        modules=("transformers",),
    ),
    "ppo-fixed": _ppo("PPO, 64 tokens each", "ppo_fixed", "fixed", {"S": 1.4, "M": 1.3}, ends=False),
    "ppo-ending": _ppo("PPO, responses end by themselves", "ppo_ending", "ending", {"S": 2.0, "M": 2.0}),
    "ppo-shared": _ppo("the same, shared trunk", "ppo_shared", "ending", {"S": 2.5, "M": 2.5}),
}


def function_of(name: str) -> Work:
    """The function named `module:function`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def measure(setting: Setting) -> dict[str, Any]:
    """Run one side of one task in this process."""
    import torch

    torch.set_num_threads(setting.threads)
    Path(setting.cache).mkdir(parents=True, exist_ok=True)
    task, clock = TASKS[setting.task], Clock(setting.warmup, setting.device)
    extra = function_of(task.ours if setting.side == "ours" else task.trl)(setting, clock)
    return clock.figures() | extra


if __name__ == "__main__":
    print(json.dumps(measure(Setting(**json.loads(sys.argv[1])))))
