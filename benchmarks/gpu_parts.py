"""Parts of `benchmarks/gpu.sh`: `python -m benchmarks.gpu_parts NAME --size L` prints figures as a line of JSON.

Each returns figures, with a `text` for the table. A promise that does not hold is an exit code of 1, with the figures.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "runs/benchmarks/gpu-models"
WANTED = ("pydantic", "pytest", "scipy", "peft", "trl", "datasets")
STEPS, KILLED_AT = 6, 3

Figures = dict[str, Any]


class Broken(Exception):
    """A promise does not hold; carries the figures that show it."""

    def __init__(self, figures: Figures) -> None:
        super().__init__(figures["text"])
        self.figures = figures


def setting(device: str, size: str, task: str = "sft", **more: Any) -> Any:
    """As a worker of the benchmarks has it; few rows on a CPU."""
    from benchmarks.worker import Setting

    few = {"rows": 64, "responses": 64} if device == "cuda" else {"rows": 8, "responses": 8}
    fixed = {"side": "ours", "steps": 1, "warmup": 1, "threads": 1, "seed": 0, "cache": str(CACHE)}
    return Setting(task=task, size=size, device=device, **{**few, **fixed, **more})


def machine(device: str, size: str) -> Figures:
    """What is there, and what is not."""
    import torch
    import transformers

    absent = [name for name in WANTED if importlib.util.find_spec(name) is None]
    where = f"{platform.machine()}, {os.cpu_count()} cores"
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        where = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    text = f"{where}, {versions}; absent: {', '.join(absent) or 'nothing'}"
    return {"text": text, "absent": absent}


def exact(device: str, size: str) -> Figures:
    """The first DPO loss and the first log-ratio of PPO, in both number formats."""
    found = {f"{name} {way}": how(device, size, way) for way in ("float32", "bfloat16") for name, how in FIRSTS.items()}
    wrong = [name for name, value in found.items() if value != 0.0]
    figures = {"differences": found, "text": f"differences {sorted(set(found.values()))} in {', '.join(found)}"}
    if wrong:
        raise Broken(figures)
    return figures


def first_dpo_loss(device: str, size: str, precision: Any) -> float:
    """Its distance from ln 2 as float32 has it, and that of the implicit rewards from 0."""
    import torch

    from benchmarks.workload import make_pairs
    from rlhf_core.config import DPOConfig
    from rlhf_core.data.batching.pairs import PreferencePair, group_pairs
    from rlhf_core.models.policy import load_policy
    from rlhf_core.state.compute_mode import ComputeMode, computing
    from rlhf_core.state.run_context import RunContext
    from rlhf_core.trainers.optimisation import fresh_state
    from rlhf_core.trainers.preference.trainer import train_dpo

    subject = setting(device, size).subject
    pairs = [PreferencePair(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in make_pairs(8, subject, 0)]
    policy, reference = (load_policy(subject.folder).to(device) for _ in range(2))
    cfg = DPOConfig(epochs=1, prompts_per_step=8, learning_rate=1e-6, warmup_steps=0)
    with computing(ComputeMode(precision=precision)):
        run = RunContext(seed=0, pad_id=subject.pad)
        first = train_dpo(cfg, fresh_state({"policy": policy}, 1e-6), reference, group_pairs(pairs), run).history[0]
    ln_2 = -torch.nn.functional.logsigmoid(torch.zeros(())).item()
    rewards = abs(first["implicit_reward/chosen"]) + abs(first["implicit_reward/rejected"])
    return abs(first["loss/preference"] - ln_2) + rewards


def first_log_ratio(device: str, size: str, precision: Any) -> float:
    """The largest distance of new from old log-probabilities, and of the reference's, before any step."""
    import torch

    from benchmarks.rollouts import make_prompts
    from rlhf_core.config import PPOConfig
    from rlhf_core.models.policy import load_policy
    from rlhf_core.models.scoring.reward_model import RewardModel
    from rlhf_core.models.scoring.value import ValueHead
    from rlhf_core.rollout.logprobs import response_logprobs
    from rlhf_core.rollout.sampler import Sampling
    from rlhf_core.state.compute_mode import ComputeMode, computing
    from rlhf_core.state.run_context import RunContext
    from rlhf_core.trainers.ppo.rollout import RolloutSetup, collect_rollout, write_responses

    subject = setting(device, size).subject
    policy, reference = (load_policy(subject.folder).to(device) for _ in range(2))
    shared = {"model": "shared"}
    with computing(ComputeMode(precision=precision)):
        setup = RolloutSetup(
            cfg=PPOConfig.model_validate({"steps": 1, "rollout_batch": 8, "minibatch": 4, "value": shared}),
            modules={"policy": policy, "value": ValueHead(policy.config.hidden_size).to(device)},
            reference=reference,
            score=RewardModel.from_policy(policy, "last", seed=1),
            prompts=make_prompts(8, subject, 0),
            sampling=Sampling(eos_ids=(), pad_id=subject.pad, max_new_tokens=16),
            run=RunContext(seed=0, pad_id=subject.pad),
        )
        generator = torch.Generator().manual_seed(3)
        rollout = collect_rollout(setup, write_responses(setup, range(8), generator), [], generator)
        far = 0.0
        for part in rollout.parts():
            new_BR = response_logprobs(policy, part.batch).detach()
            both = (new_BR - part.old_logprobs_BR, part.old_logprobs_BR - part.ref_logprobs_BR)
            far = max(far, *(one.abs().max().item() for one in both))
    return far


FIRSTS: dict[str, Callable[[str, str, str], float]] = {"DPO": first_dpo_loss, "PPO": first_log_ratio}


def resume(device: str, size: str) -> Figures:
    """Train, and train killed with SIGKILL in between and taken up again; weights and moments have the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        whole = _train(device, size, Path(folder) / "whole", 0)
        killed = _train(device, size, Path(folder) / "broken", KILLED_AT)
        resumed = _train(device, size, Path(folder) / "broken", 0)
    figures = {
        "killed_by": killed["signal"],
        "resumed_from": resumed["from"],
        "same": whole["digest"] == resumed["digest"],
    }
    figures["text"] = (
        f"killed by signal {killed['signal']}, resumed at step {resumed['from']}: same bytes: {figures['same']}"
    )
    if (killed["signal"], resumed["from"], figures["same"]) != (signal.SIGKILL, KILLED_AT, True):
        raise Broken(figures)
    return figures


def _train(device: str, size: str, folder: Path, kill_at: int) -> Figures:
    command = [sys.executable, "-m", "benchmarks.gpu_parts", "train", "--device", device, "--size", size]
    done = subprocess.run(
        [*command, "--folder", str(folder), "--kill-at", str(kill_at)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode > 0:
        raise RuntimeError(f"training ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return {"signal": -done.returncode} | (json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {})


def train(device: str, size: str, folder: Path, kill_at: int) -> Figures:
    """SFT with a checkpoint a step, in bfloat16 on a GPU; the process kills itself after step `kill_at`."""
    import torch

    from benchmarks.ours import compute_as
    from benchmarks.workload import make_pairs
    from rlhf_core.config import SFTConfig
    from rlhf_core.data.batching.examples import Example
    from rlhf_core.models.policy import load_policy
    from rlhf_core.state.checkpoint import Checkpointer
    from rlhf_core.state.run_context import RunContext
    from rlhf_core.trainers.optimisation import fresh_state
    from rlhf_core.trainers.sft import train_sft

    torch.use_deterministic_algorithms(True)
    wanted = setting(device, size)
    compute_as(wanted)
    state, keeper = (
        fresh_state({"policy": load_policy(wanted.subject.folder).to(device)}, 1e-3),
        Checkpointer(folder, {}),
    )
    keeper.restore(state)
    begun = state.step

    def checkpoint(state: Any) -> None:
        keeper.save(state)
        if kill_at and state.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    rows = [Example(pair.prompt, pair.chosen) for pair in make_pairs(4 * wanted.rows, wanted.subject, 0)]
    cfg = SFTConfig(max_steps=STEPS, batch_size=wanted.rows, learning_rate=1e-3, save_every=1)
    train_sft(cfg, state, rows, [], RunContext(seed=0, pad_id=wanted.subject.pad, checkpoint=checkpoint))
    digest = hashlib.sha256()
    for parameter in state.modules["policy"].parameters():
        moments = state.optimizers["policy"].state[parameter]
        for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
            digest.update(tensor.detach().cpu().numpy().tobytes())
    return {"from": begun, "digest": digest.hexdigest()}


def decode(device: str, size: str) -> Figures:
    """Tokens a second of the decoder without buffers, of the one with them kernel by kernel, and by graphs."""
    from benchmarks.ours import compute_as
    from benchmarks.rollouts import load
    from rlhf_core.rollout.graphed_decoder import GraphedDecoder
    from rlhf_core.rollout.static_decoder import StaticDecoder
    from rlhf_core.state.compute_mode import ComputeMode, compute_mode, computing

    wanted = setting(device, size, steps=2)
    compute_as(wanted)
    model, precision = load(wanted.subject, ends=False).to(device), compute_mode().precision
    made: list[Any] = []

    def graphed(model: Any) -> Any:
        made.append(GraphedDecoder(model, pretend_capture() if device == "cpu" else None))
        return made[-1]

    found = {}
    for name, decoder, graphs in (
        ("plain", StaticDecoder, "off"),
        ("off", graphed, "off"),
        ("graphs", graphed, "auto"),
    ):
        with computing(ComputeMode(precision=precision, cuda_graphs=graphs)):
            found[name] = _sampled(wanted, model, decoder)
    tokens = {name: one.pop("tokens") for name, one in found.items()}
    same = tokens["off"] == tokens["graphs"]
    figures: Figures = {"found": found, "same": same, "graphs": len(made[-1].graphs), "why_not": made[-1].why_not}
    rates = ", ".join(f"{name} {one['tokens_per_s']:,.0f}/s ({one['share']:.0%})" for name, one in found.items())
    figures["text"] = (
        f"tokens (share of the bound by memory bandwidth): {rates}; {figures['graphs']} graphs"
        f"{', none because ' + figures['why_not'] if figures['why_not'] else ''}; same tokens: {same}"
    )
    if not same:
        raise Broken(figures)
    return figures


def pretend_capture() -> Any:
    """A graph that replays recorded operations on a CPU."""
    from support.graphs import PretendCapture

    return PretendCapture()


def _sampled(wanted: Any, model: Any, decoder: Callable[[Any], Any]) -> Figures:
    """Tokens of the counted rollouts; how fast they came, and what part of the bandwidth they took."""
    from benchmarks import ours_rollouts
    from benchmarks.clock import Clock

    clock = Clock(wanted.warmup, wanted.device)
    written: list[Any] = []
    with mock.patch("rlhf_core.rollout.sampler.make_decoder", decoder):
        extra = ours_rollouts.sampled(wanted, clock, model, written)
    figures = clock.figures()
    rate = figures["tokens"] / figures["wall_s"]
    share = rate * extra["bytes_per_token"] / extra["bytes_per_s"]
    return {"tokens": written, "tokens_per_s": rate, "share": share, "peak_mb": figures["peak_mb"]}


def ppo(device: str, size: str) -> Figures:
    """A rollout with its updates, all weights of policy and value model trained; the second of two."""
    return _iteration(device, size, value="separate", rank=0)


def ppo_lora(device: str, size: str) -> Figures:
    """The same with adapters of rank 16 and the value as a head on the policy's states."""
    return _iteration(device, size, value="shared", rank=16)


def _iteration(device: str, size: str, *, value: str, rank: int) -> Figures:
    from benchmarks import ours_rollouts
    from benchmarks.clock import Clock

    wanted = setting(device, size)
    clock = Clock(wanted.warmup, device)
    figures: Figures = {**ours_rollouts.ppo(wanted, clock, ends=False, value=value, rank=rank), **clock.figures()}
    rate = figures["tokens"] / figures["wall_s"]
    figures["text"] = f"{figures['wall_s']:.2f} s, {rate:,.0f} tokens/s, peak {figures['peak_mb']:,.0f} MiB"
    return figures


def tests(device: str, size: str) -> Figures:
    """The tests marked gpu; on a CPU some of those bodies that run there too."""
    if importlib.util.find_spec("pytest") is None:
        raise SystemExit("pytest is not installed: not run; the other parts do not need it")
    chosen = ("-m", "gpu") if device == "cuda" else ("-k", "n04 or n32")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, "tests/rlhf_core/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(done.stdout[-20000:], done.stderr[-2000:])
    figures = {"text": " · ".join([lines[-1] if lines else "pytest said nothing", *failed[:5]]), "failed": failed}
    if done.returncode:
        raise Broken(figures)
    return figures


PARTS: dict[str, Callable[[str, str], Figures]] = {
    part.__name__: part for part in (machine, exact, resume, decode, ppo, ppo_lora, tests)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a part and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "train"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", default="L")
    parser.add_argument("--folder", type=Path, help="checkpoints of train")
    parser.add_argument("--kill-at", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        if options.part == "train":
            figures = train(options.device, options.size, options.folder, options.kill_at)
        else:
            figures = PARTS[options.part](options.device, options.size)
    except Broken as broken:
        print(json.dumps(broken.figures))
        return 1
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
