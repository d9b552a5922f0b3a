"""Stage `align@chain`: algorithms one after the other, each from the policy of the one before.

Every link is a training run of its own, with checkpoints of its own, and a mark where it has ended. A chain that is
run again passes over the links that have ended, by their marks, and goes on inside the link it was broken off in.
A link also ends when a bound of `align.chain.switch` is passed, measured between steps; what was measured travels with
the checkpoints, and measuring again gives the same numbers, so the decision does not depend on a break either.
"""

import copy
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import ChainConfig
from rlhf_core.engine.batches import WIDE_ROWS_AT_ONCE
from rlhf_core.evaluation.drift import drift_figures
from rlhf_core.evaluation.policy_measurement import PolicyEvaluator
from rlhf_core.models.adapters import has_adapters, merged
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.checkpoint import Checkpointer
from rlhf_core.state.sharding import lend_whole
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import REFUSED
from rlhf_core.trainers.ppo.aside import SET_ASIDE
from rlhf_core.trainers.ppo.guard import STOPPED
from tasks.frame.stage import Stage
from tasks.stages.align.dpo import run_dpo
from tasks.stages.align.ppo import run_ppo
from tasks.stages.align.prompts import training_prompts

MEASURED, ENDED = "chain/measured", "chain/ended"


class LinkOver(Exception):
    """A link has ended before its last step, or had ended before it was begun again."""


def run_chain(
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: RewardModel | RewardEnsemble,
) -> tuple[TrainState, dict[str, Any]]:
    """Train `policy` link by link; returns a state with the steps and curves of all links, and figures of each.

    Raises:
        ConfigError, DataError, Diverged: as the algorithms do.
    """
    cfg = stage.params.align.chain
    yardstick = Yardstick(stage, tokenizer, reference, reward_model)
    whole, figures = TrainState(modules={"policy": policy}), []
    for number, algorithm in enumerate(cfg.links):
        start = reference
        if cfg.reference == "previous" and number:
            start = merged(policy) if has_adapters(policy) else copy.deepcopy(policy).eval()
        keeper = LinkKeeper(stage, cfg, number, yardstick, steps_before=whole.step, tokens_before=_tokens(whole))
        try:
            if algorithm == "ppo":
                key = "align.chain.ppo"
                run_ppo(stage, tokenizer, policy, start, reward_model, cfg.ppo, keeper, key)
            else:
                settings = cfg.dpo if algorithm == "dpo" else cfg.ipo
                run_dpo(stage, tokenizer, policy, start, settings, keeper)
        except LinkOver:
            pass
        state = keeper.end()
        stage.make_whole(state)
        figures.append({"algorithm": algorithm, "steps": state.step, **state.extra[ENDED]})
        whole.history += [
            row | {"step": row["step"] + whole.step, "chain/link": float(number + 1)} for row in state.history
        ]
        whole.step += state.step
        whole.extra["tokens"] = _tokens(whole) + _tokens(state)
        add_refusals(whole, state)
    stage.history = whole.history
    return whole, {"links": figures}


def add_refusals(whole: TrainState, state: TrainState) -> None:
    """Count and name in the chain's state what a link refused and set aside; steps are counted over the chain."""
    for key in (key for key in state.extra if key.startswith(REFUSED)):
        whole.extra[key] = whole.extra.get(key, 0) + state.extra[key]
    own = state.extra.get(SET_ASIDE)
    if own:
        known = whole.extra.setdefault(SET_ASIDE, {"responses": 0, "rollouts": 0, "named": []})
        steps_before = whole.step - state.step
        whole.extra[SET_ASIDE] = {
            "responses": known["responses"] + own["responses"],
            "rollouts": known["rollouts"] + own["rollouts"],
            "named": [*known["named"], *(one | {"step": one["step"] + steps_before} for one in own["named"])],
        }


class Yardstick:
    """Measures a policy as a chain's switch does: on the same training prompts, with the same random numbers each time.

    Args:
        stage: whose prompts and settings.
        reference: the SFT model; the policy itself where it carries adapters.
    """

    def __init__(
        self,
        stage: Stage,
        tokenizer: PreTrainedTokenizerBase,
        reference: PreTrainedModel,
        reward_model: RewardModel | RewardEnsemble,
    ) -> None:
        prompts = [ids for _, ids in training_prompts(stage, tokenizer)]
        order = torch.randperm(len(prompts), generator=stage.rng()("switch prompts"))
        self.stage, self.reference, self.reward_model = stage, reference, reward_model
        self.evaluator = PolicyEvaluator(
            tokenizer=tokenizer,
            prompts=[prompts[i] for i in order[: stage.params.align.chain.switch.prompts].tolist()],
            max_new_tokens=stage.params.model.max_response_tokens,
            scored_at_once=WIDE_ROWS_AT_ONCE,
        )

    def __call__(self, policy: PreTrainedModel) -> dict[str, float]:
        """Nats a response from the SFT model (`train_kl_to_sft`), and the reward model's mean `train_score`."""
        responses = self.evaluator.sample("chain", policy, self.stage.rng()("switch"))
        logprobs = self.evaluator.logprobs(policy, self.reference, responses)
        scores = self.evaluator.scores(self.reward_model, responses)
        drift = drift_figures(*logprobs, responses.num_tokens)
        return {"train_kl_to_sft": drift["kl_to_sft"], "train_score": fmean(scores)}


class LinkKeeper:
    """Keeps one link's state, hears its steps, and ends it when a bound is passed (a `Keeper`).

    Args:
        number: place of the link in the chain, from 0.
        steps_before, tokens_before: of the links before it.
    """

    def __init__(
        self,
        stage: Stage,
        cfg: ChainConfig,
        number: int,
        yardstick: Yardstick,
        *,
        steps_before: int,
        tokens_before: int,
    ) -> None:
        self.stage, self.cfg, self.number, self.yardstick = stage, cfg, number, yardstick
        self.steps_before, self.tokens_before = steps_before, tokens_before
        self._state = TrainState()

    def restore(self, state: TrainState) -> TrainState:
        """Load what was kept of this link.

        Raises:
            LinkOver: it had ended, or ends now, by what is measured where it was broken off.
        """
        self._state = state
        identity = self.stage.identity() | {"link": str(self.number)}  # complete only now: see Stage.depends_on
        folder = self.stage.checkpoint_folder() / f"link-{self.number}"
        self._running = Checkpointer(folder / "running", identity, world=self.stage.world)
        self._ended = Checkpointer(folder / "ended", identity, world=self.stage.world)
        if self._ended.restore(state):
            raise LinkOver
        if self._running.restore(state) and self.stage.place.rank == 0:
            print(f"link {self.number + 1} resumed at step {state.step}", flush=True)
            self.stage.log.event("resumed", step=self.steps_before + state.step)
        self._measure()
        return state

    def checkpoint(self, state: TrainState) -> None:
        """Keep the link's state."""
        self._running.save(state)

    def log(self, step: int, total: int, metrics: Mapping[str, float], tokens: int) -> None:
        """Report a step of the link as one of the chain, then measure.

        Raises:
            LinkOver: a bound is passed.
        """
        figures = dict(metrics) | {"chain/link": self.number + 1}
        self.stage.log(self.steps_before + step, self.steps_before + total, figures, self.tokens_before + tokens)
        if step < total:
            self._measure()

    def end(self) -> TrainState:
        """Mark the link as ended, with what is measured at its end; returns its state."""
        if ENDED not in self._state.extra:
            reason = "guard" if STOPPED in self._state.extra else self._passed() or "last step"
            self._state.extra[ENDED] = {"ended_by": reason, **self._ask()}
            self._ended.save(self._state)
        return self._state

    def _ask(self) -> dict[str, float]:
        """What the yardstick says of the policy; each process asks it by itself, and all hear the same."""
        with lend_whole(self._state.modules["policy"]) as policy:
            return self.yardstick(policy)

    def _measure(self) -> None:
        """Take a measurement where one is due and none was kept; judge by it."""
        switch, step = self.cfg.switch, self._state.step
        if not switch.measures or step % switch.every:
            return
        measured = self._state.extra.setdefault(MEASURED, [])
        if not measured or measured[-1]["step"] != step:
            measured.append({"step": step, **self._ask()})
        if self._passed():
            raise LinkOver

    def _passed(self) -> str | None:
        """The bound that the last measurement passed."""
        measured, switch = self._state.extra.get(MEASURED, []), self.cfg.switch
        if len(measured) < 2:
            return None
        first, before, last = measured[0], measured[-2], measured[-1]
        if switch.max_kl is not None and last["train_kl_to_sft"] - first["train_kl_to_sft"] > switch.max_kl:
            return "max_kl"
        if switch.min_score_gain is not None and last["train_score"] - before["train_score"] < switch.min_score_gain:
            return "min_score_gain"
        return None


def _tokens(state: TrainState) -> int:
    return int(state.extra.get("tokens", 0))
