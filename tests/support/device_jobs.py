"""What every part of the library does on a device, as jobs that return numbers: two devices must say the same.

A job builds its models on the CPU, seeded, moves them and does its work where it is told. `test_devices.py` runs the
jobs on a pretend GPU, `gpu/` on a real one.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_core.config import DPOConfig, ModelConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.config.preference import PreferenceLoss
from rlhf_core.config.reward import RewardEnsembleConfig, RewardLossConfig
from rlhf_core.config.sft import HardExamplesConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.data.batching.pairs import PairLabel
from rlhf_core.evaluation.policy_measurement import response_logprob_sums
from rlhf_core.evaluation.response_scores import read_responses, reward_scores
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueHead, ValueModel
from rlhf_core.objectives.preference import PAIR_LOSSES
from rlhf_core.rollout.best_of_n import pick
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.rollout.token_draw import OPEN, CutOff
from rlhf_core.state.checkpoint import Checkpointer
from rlhf_core.state.compute_mode import ComputeMode, computing
from rlhf_core.state.rng import StepRng
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.guard import Watch
from rlhf_core.trainers.ppo.trainer import Rewards, train_ppo
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward.plan import make_models
from rlhf_core.trainers.reward.teacher import ensemble_of
from rlhf_core.trainers.reward.trainer import standardise, train_reward
from rlhf_core.trainers.sft import train_sft
from support.preference import EOS, PAD, toy_groups

Job = Callable[[torch.device], list[float]]

SIZES = ModelConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, init_std=0.2, vocab_size=512)
ENDS = (EOS, 2, 3)
SAMPLING = Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=8)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16] * 8, [17, 18, 19], [8], [20, 21]]
LABELS = (PairLabel(agreement=0.8), PairLabel(agreement=0.6, margin=0.5), PairLabel(margin=0.0, tie=True))
GROUPS = toy_groups(8, labels=LABELS[:2])
RANKED = [replace(one, responses=one.responses[:3], pairs=[(0, 1), (0, 2), (1, 2)], labels=[]) for one in GROUPS]
RATE: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 0}
MODES = {"bfloat16": ComputeMode(precision="bfloat16"), "checkpointing": ComputeMode(activation_checkpointing=True)}


def policy(device: torch.device | str, kind: str = "llama", seed: int = 1) -> PreTrainedModel:
    """A small language model on a device."""
    if kind == "gpt2":
        torch.manual_seed(seed)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=24, **sizes)).eval().to(device)
    return build_policy(SIZES.model_copy(update={"family": kind}), 24, PAD, EOS, seed=seed).to(device)


def adapted(model: PreTrainedModel, rank: int, *, dora: bool = False) -> PreTrainedModel:
    """The model with adapters; rank 0 has none."""
    if rank:
        pytest.importorskip("peft")
        add_adapters(model, LoraConfig(rank=rank, alpha=8, use_dora=dora), seed=5)
    return model


def state_of(rate: float = 1e-3, **modules: nn.Module) -> TrainState:
    """A state before its first step, an optimiser for each module."""
    optimizers = {name: make_optimizer(module, rate) for name, module in modules.items()}
    return TrainState(modules=modules, optimizers=optimizers)


def _quiet(*_: object) -> None:
    """Reports and checkpoints that nobody keeps."""


def _figures(state: TrainState) -> list[float]:
    """All figures of all steps, and where the weights ended."""
    assert {parameter.device for module in state.modules.values() for parameter in module.parameters()}
    ends = [
        sum(p.detach().double().abs().sum().item() for p in module.parameters()) for module in state.modules.values()
    ]
    rows = [value for row in state.history for value in row.values()]
    return rows + ends


def sampling(device: torch.device, kind: str = "llama", cut_off: CutOff = OPEN, **more: Any) -> list[float]:
    """Rows that end at different times and leave, at several temperatures; ids and log-probabilities."""
    model: Any = policy(device, "llama" if kind == "mixture" else kind)
    if kind == "mixture":
        model = PolicyMixture([model, policy(device, seed=2)], [0.25, 0.75])
    temperature = [(0.0, 0.7, 1.0, 1.3)[row % 4] for row in range(4 * len(PROMPTS))]
    samples = sample_responses(
        model,
        PROMPTS * 4,
        Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=12),
        generator=torch.Generator().manual_seed(3),
        batch_size=32,
        cut_off=cut_off,
        **{"temperature": temperature, **more},
    )
    rows = [samples.response_ids, samples.logprobs, samples.behaviour_logprobs]
    return [float(value) for column in rows for row in column for value in row]


def sft(device: torch.device, kind: str = "llama", rank: int = 0, *, dora: bool = False) -> list[float]:
    """Two steps in micro-batches, with masked tokens, weights by loss and held-out losses."""
    model = adapted(policy(device, kind), rank, dora=dora)
    rows = [Example(group.prompt, group.responses[0]) for group in GROUPS]
    rows[0] = Example(rows[0].prompt, rows[0].response, mask=[0] + [1] * (len(rows[0].response) - 1))
    cfg = SFTConfig(
        max_steps=2, batch_size=4, accumulation=2, eval_every=1, hard_examples=HardExamplesConfig(),
        max_grad_value=0.5, **RATE,
    )  # fmt: skip
    state = state_of(policy=model)
    return _figures(train_sft(cfg, state, rows, rows[:3], RunContext(seed=0, pad_id=PAD)))


def reward(device: torch.device, kind: str = "llama", tied: bool = False, **settings: Any) -> list[float]:
    """Two steps a model; then what it says of responses, one model or several."""
    cfg = RewardConfig.model_validate({"epochs": 1, "prompts_per_step": 4, **RATE, **settings})
    groups = toy_groups(8, labels=LABELS) if tied else RANKED if cfg.loss.name == BY_RANKING else GROUPS
    models = make_models(cfg, policy(device, kind), StepRng(0, "reward"))
    state = state_of(**models)
    trained = train_reward(cfg, state, groups, RunContext(seed=0, pad_id=PAD))
    model: Any = models.get("reward") or ensemble_of(cfg, models, trained.aggregation)
    asked = [group.prompt for group in groups], [group.responses[0] for group in groups]
    standardise(model, reward_scores(model, *asked, pad_id=PAD, batch_size=3))
    readings = read_responses(model, *asked, pad_id=PAD, batch_size=3)
    said = [value for one in readings for value in (one.score, one.deviation or 0.0, *one.criteria, *one.members)]
    return _figures(state) + said


def preference(device: torch.device, loss: str, rank: int = 0, **settings: Any) -> list[float]:
    """Two steps against a reference, or against the policy without its adapters."""
    cfg = DPOConfig.model_validate({"loss": loss, "prompts_per_step": 4, **RATE, **settings})
    model, reference = adapted(policy(device), rank), policy(device, seed=2)
    asked = (model if rank else reference) if PAIR_LOSSES[cfg.loss].needs_reference else None
    state = state_of(policy=model)
    return _figures(train_dpo(cfg, state, asked, GROUPS, RunContext(seed=0, pad_id=PAD)))


def ppo_state(device: torch.device, cfg: PPOConfig) -> tuple[TrainState, RewardModel]:
    """A state with the value model that `cfg` asks for, and a reward model."""
    model = policy(device)
    scorer = RewardModel.from_policy(model, "last", seed=1)
    modules: dict[str, nn.Module] = {"policy": model}
    if cfg.has_value_model:
        shared = cfg.value.model == "shared"
        modules["value"] = ValueHead(32).to(device) if shared else ValueModel.from_reward_model(scorer)
    return state_of(**modules), scorer


def ppo_run(cfg: PPOConfig, state: TrainState, scorer: RewardModel, checkpoint: Any = _quiet) -> TrainState:
    """Train on the toy prompts."""
    device = state.modules["policy"].device
    watch = Watch(prompts=PROMPTS[:3], rate=lambda rows: [float(len(row.response_ids)) for row in rows])
    return train_ppo(
        cfg,
        state,
        policy(device, seed=2),
        Rewards(scorer),
        PROMPTS,
        RunContext(seed=0, pad_id=PAD, checkpoint=checkpoint),
        sampling=SAMPLING,
        watch=watch if cfg.guard.every else None,
    )


def ppo_config(**settings: Any) -> PPOConfig:
    """Small rollouts."""
    small = {"steps": 2, "rollout_batch": 8, "minibatch": 4, "epochs": 1, "target_kl": 10.0, **RATE}
    return PPOConfig.model_validate({**small, **settings})


def ppo(device: torch.device, **settings: Any) -> list[float]:
    """Two rollouts and their updates."""
    cfg = ppo_config(**settings)
    return _figures(ppo_run(cfg, *ppo_state(device, cfg)))


def resumed(device: torch.device) -> list[float]:
    """PPO with running moments and replay, broken off after a rollout and taken up from its checkpoint."""
    cfg = ppo_config(scores={"normalise": "running"}, replay={"rows": 4}, kl={"controller": "adaptive"}, save_every=1)
    whole = ppo_run(cfg, *ppo_state(device, cfg))
    with tempfile.TemporaryDirectory() as folder:
        keeper = Checkpointer(Path(folder), {"test": "devices"})
        ppo_run(cfg.model_copy(update={"steps": 1}), *ppo_state(device, cfg), checkpoint=keeper.save)
        state, scorer = ppo_state(device, cfg)
        assert keeper.restore(state)
        assert state.step == 1
        ppo_run(cfg, state, scorer)
    pairs = zip(whole.modules.values(), state.modules.values(), strict=True)
    same = [torch.equal(a, b) for one, two in pairs for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    moments = [
        value for optimizer in state.optimizers.values() for one in optimizer.state.values() for value in one.values()
    ]
    assert {moment.device.type for moment in moments} == {device.type}
    return [float(all(same)), *_figures(state)]


def guarded(device: torch.device) -> list[float]:
    """A guard that finds the third rollout too far away and goes back to the best weights."""
    cfg = ppo_config(steps=3, guard={"every": 1, "scorer": "m:f", "prompts": 3, "patience": 1, "max_kl": 500.0})
    return _figures(ppo_run(cfg, *ppo_state(device, cfg)))


def measured(device: torch.device) -> list[float]:
    """Log-probabilities summed a response, and the picks of best-of-n."""
    asked = [group.prompt for group in GROUPS], [group.responses[0] for group in GROUPS]
    sums = response_logprob_sums(policy(device), *asked, pad_id=PAD, batch_size=3)
    scores_NC = torch.tensor([[0.5, 2.0, 1.0, 3.0], [1.0, 1.0, 0.0, -1.0]], device=device)
    return [*sums.tolist(), *pick(scores_NC, 2, "best").flatten().tolist(), *pick(scores_NC, 4, "contrast")[0].tolist()]


def in_mode(mode: str, job: Job) -> Job:
    """The job in another compute mode."""

    def run(device: torch.device) -> list[float]:
        with computing(MODES[mode]):
            return job(device)

    return run


WEIGHED = {"nll_coef": 0.2, "pair_weights": "agreement"}
WITHOUT_VALUES = ("reinforce", "rloo", "grpo")
HEADS = get_args(RewardConfig.model_fields["head"].annotation)
BY_RANKING = "plackett_luce"
REWARD_LOSSES = get_args(RewardLossConfig.model_fields["name"].annotation)
AGGREGATES = get_args(RewardEnsembleConfig.model_fields["aggregate"].annotation)

JOBS: dict[str, Job] = {
    "sampling": sampling,
    "sampling, qwen2, top-p": partial(sampling, kind="qwen2", cut_off=CutOff(top_p=0.6)),
    "sampling, top-k and top-p": partial(sampling, cut_off=CutOff(top_k=5, top_p=0.8), temperature=1.0),
    "sampling, general cache": partial(sampling, kind="gpt2"),
    "sampling, mixture": partial(sampling, kind="mixture"),
    "sft": sft,
    "sft, gpt2": partial(sft, kind="gpt2"),
    "sft, lora": partial(sft, rank=2),
    "sft, dora": partial(sft, rank=2, dora=True),
    **{f"reward, {head}": partial(reward, head=head) for head in HEADS},
    **{f"reward, {name}": partial(reward, loss={"name": name}) for name in REWARD_LOSSES[1:] if name != BY_RANKING},
    "reward, rankings": partial(reward, loss={"name": BY_RANKING, "average": "prompt"}),
    "reward, margin, centred": partial(
        reward, centering=0.1, loss={"name": "margin", "margin_from": "strength", "weights": "difficulty",
                                     "center": "pairs", "average": "prompt"},
    ),
    "reward, ties": partial(reward, tied=True, loss={"ties": "rao_kupper"}),
    "reward, beside SFT and contrast": partial(reward, auxiliary={"sft_coef": 0.1, "contrastive_coef": 0.1}),
    **{f"reward, by {way}": partial(reward, ensemble={"members": 2, "aggregate": way}) for way in AGGREGATES},
    "reward, distilled scores": partial(reward, ensemble={"members": 2, "distill": "scores"}),
    "reward, distilled preferences": partial(reward, ensemble={"members": 2, "distill": "preferences"}),
    **{f"preference, {loss}": partial(preference, loss=loss, **WEIGHED) for loss in get_args(PreferenceLoss)},
    "preference, lora": partial(preference, loss="sigmoid", rank=2),
    "ppo": partial(ppo, entropy_coef=0.01, microbatch=2, epochs=2),
    "ppo, shared value": partial(ppo, value={"model": "shared"}),
    "ppo, replay, terms, adaptive": partial(
        ppo, replay={"rows": 4}, scores={"normalise": "quantile", "terms": {"length": 0.1, "diversity": 0.1}},
        kl={"controller": "adaptive", "estimator": "k3"}, curriculum={"start_share": 0.5},
        advantages={"truncated": "bootstrap"},
    ),
    **{f"ppo, {way}": partial(ppo, responses_per_prompt=2, advantages={"method": way}) for way in WITHOUT_VALUES},
    "ppo, guard": guarded,
    "resumed": resumed,
    "measured": measured,
    "sft, checkpointing": in_mode("checkpointing", sft),
    "sft, gpt2, checkpointing": in_mode("checkpointing", partial(sft, kind="gpt2")),
}  # fmt: skip

NARROW_JOBS: dict[str, Job] = {
    name: in_mode("bfloat16", job)
    for name, job in {
        "sampling": partial(sampling, temperature=0.0),
        "sft": sft,
        "sft, gpt2": partial(sft, kind="gpt2"),
        "sft, lora": partial(sft, rank=2),
        "reward": partial(reward, head="gated"),
        "preference": partial(preference, loss="sigmoid"),
        "ppo": partial(ppo, steps=1),
    }.items()
}
"""Jobs in bfloat16, whose numbers agree to its precision only."""


def differing(one: Sequence[float], two: Sequence[float], bound: float) -> list[tuple[int, float, float]]:
    """Places where two lists part by more than `bound`, of 1 or of the number where that is larger; NaN equals NaN."""
    return [
        (place, a, b)
        for place, (a, b) in enumerate(zip(one, two, strict=True))
        if not (math.isnan(a) and math.isnan(b)) and not abs(a - b) <= bound * max(1.0, abs(a))
    ]
