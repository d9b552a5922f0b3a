"""The guard against over-optimisation: a scorer that training never sees watches held-out prompts.

A policy that is pushed far enough finds responses that its reward model overrates; the true quality then falls while
the proxy rises (Gao, Schulman and Hilton 2023). So every few rollouts both scorers read the same fresh responses to
the same held-out prompts, drawn with the same random numbers each time. When the proxy stands higher than at the best
reading and the held-out score lower by more than a bound, several readings in a row, or when the divergence from the
reference passes its cap, training ends and the policy goes back to the weights of the best reading.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from rlhf_core.config.ppo import GuardConfig
from rlhf_core.engine.batches import SequenceBatch, cut
from rlhf_core.errors import check_finite
from rlhf_core.evaluation.response_scores import read_passes
from rlhf_core.objectives.kl import kl_to_reference
from rlhf_core.state.rng import StepRng
from rlhf_core.state.sharding import in_step, part_like, whole
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.ppo.forward import policy_outputs, reference_token_logprobs
from rlhf_core.trainers.ppo.rollout import RolloutSetup, write_responses
from rlhf_core.trainers.ppo.terms import Rate, checked_rates

GUARD, STOPPED, BEST = "guard", "stopped_by_guard", "guard_best/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """What the guard looks at.

    Attributes:
        prompts: held-out prompts; `Written.prompt` of what `rate` is given counts in them.
        rate: the held-out scorer.
    """

    prompts: Sequence[list[int]]
    rate: Rate


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardReading:
    """Means over the held-out prompts: the reward model's score, the held-out one, nats from the reference."""

    step: int
    proxy: float
    heldout: float
    kl: float

    def figures(self) -> dict[str, float]:
        """The reading as figures of its step."""
        return {
            "eval/proxy_score": self.proxy,
            "eval/heldout_score": self.heldout,
            "eval/kl_to_reference": self.kl,
        }


@dataclass(frozen=True, slots=True)
class Guard:
    """Reads, judges and ends a run, whose rollouts are made with `setup`; without `watch` it does nothing."""

    setup: RolloutSetup
    watch: Watch | None

    def at_start(self, state: TrainState) -> None:
        """Read the policy that training starts from: the first that the others are compared with."""
        if self.watch is not None and GUARD not in state.extra:
            take_in(self.setup.cfg.guard, state, self.read(self.watch, state))

    def after_step(self, state: TrainState, rollout_kl: float | None) -> dict[str, float]:
        """Read where a reading is due, and take the run back where it must end; returns figures of the reading.

        `rollout_kl` is None where the rollout had no finite response.
        """
        if self.watch is None:
            return {}
        cfg = self.setup.cfg.guard
        reason, figures = None if rollout_kl is None else _over_cap(cfg, rollout_kl), {}
        if reason is None and state.step % cfg.every == 0:
            reading = self.read(self.watch, state)
            figures, reason = reading.figures(), take_in(cfg, state, reading)
        if reason is not None:
            go_back(state, reason)
        return figures | {"eval/stopped_by_guard": float(reason is not None)}

    @torch.no_grad()
    def read(self, watch: Watch, state: TrainState) -> GuardReading:
        """Sample a response to every held-out prompt, and take both scores and the divergence.

        Raises:
            DataError: the held-out scorer did not give one finite number a response.
            Diverged: the reward model or a policy did not: a mean that is no number is above and below no bound.
        """
        setup, run = replace(self.setup, prompts=watch.prompts), self.setup.run
        policy, prompts, size = state.modules["policy"], watch.prompts, setup.cfg.minibatch
        written = write_responses(setup, range(len(prompts)), StepRng(run.seed, "ppo")("guard"))
        mine = run.world.share(range(len(written)))
        # more passes than this process has rows for, at the end, where a divided policy needs them
        passes = [rows for rows, _ in in_step(cut(mine, size), policy, run.world)]
        ids = [prompts[row.prompt] for row in written], [row.response_ids for row in written]
        read = read_passes(partial(self._score_and_kl, state), *ids, passes, pad_id=run.pad_id, device=policy.device)
        both = [numbers for _, numbers in read][: len(mine)]
        heldout = checked_rates("align.ppo.guard.scorer", watch.rate([written[row] for row in mine]), len(mine))
        proxy, drift = zip(*run.world.collect(both), strict=True)
        check_finite(proxy, "align.ppo.guard: the reward model's score of the response to held-out prompt")
        check_finite(drift, "align.ppo.guard: the divergence of the response to held-out prompt")
        heldout = run.world.collect(heldout)
        return GuardReading(step=state.step, proxy=fmean(proxy), heldout=fmean(heldout), kl=fmean(drift))

    def _score_and_kl(self, state: TrainState, batch: SequenceBatch) -> list[tuple[float, float]]:
        """The proxy's score of each response, and its divergence from the reference in nats."""
        policy, temperature = state.modules["policy"], self.setup.cfg.temperature
        logprobs_BR = policy_outputs(state.modules, batch, temperature).logprobs_BR
        others_BR = reference_token_logprobs(policy, self.setup.reference, batch, temperature)
        kl_B = kl_to_reference(logprobs_BR, others_BR, batch.response_mask_BR)
        return list(zip(self.setup.score(batch).tolist(), kl_B.tolist(), strict=True))


def _over_cap(cfg: GuardConfig, kl: float) -> str | None:
    return f"KL to the reference {kl:.3g} is above max_kl {cfg.max_kl:g}" if kl > cfg.max_kl else None


def take_in(cfg: GuardConfig, state: TrainState, reading: GuardReading) -> str | None:
    """Note a reading in the state; return why the run must end, or None.

    The weights of the reading with the highest held-out score within the cap stay in `state.tensors`.
    """
    known: dict[str, Any] = state.extra.setdefault(GUARD, {"best": None, "bad_in_a_row": 0})
    best = None if known["best"] is None else GuardReading(**known["best"])
    if _over_cap(cfg, reading.kl):
        return _over_cap(cfg, reading.kl)
    if best is None or reading.heldout > best.heldout:
        known["best"], known["bad_in_a_row"] = asdict(reading), 0
        _keep(state)
        return None
    parted = reading.proxy > best.proxy and reading.heldout < best.heldout - cfg.max_drop
    known["bad_in_a_row"] = known["bad_in_a_row"] + 1 if parted else 0
    if known["bad_in_a_row"] < cfg.patience:
        return None
    return (
        f"proxy score {best.proxy:.3g} to {reading.proxy:.3g} since step {best.step}, "
        f"held-out score {best.heldout:.3g} to {reading.heldout:.3g}"
    )


@torch.no_grad()
def go_back(state: TrainState, reason: str) -> None:
    """Give the networks the weights of the best reading and mark the run as ended by the guard."""
    for name, module in state.modules.items():
        for key, parameter in module.named_parameters():
            kept = state.tensors.get(f"{BEST}{name}/{key}")
            if kept is not None:
                parameter.copy_(part_like(kept, parameter))
    best = state.extra[GUARD]["best"]
    state.extra[STOPPED] = {"step": state.step, "best_step": best["step"] if best else 0, "reason": reason}


def _keep(state: TrainState) -> None:
    """Copy the trainable weights, whole, to the CPU."""
    for name, module in state.modules.items():
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                state.tensors[f"{BEST}{name}/{key}"] = whole(parameter.detach()).cpu().clone()
