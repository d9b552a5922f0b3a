"""Stage `combine@weights` and `combine@probabilities`: two or more aligned policies made into one.

How much each counts is chosen on held-out preference pairs, which none trained on and which are not the prompts of
the A/B comparison. Each member alone is measured in the same way. Whether the combination is worth it is then measured
on pairs of other held-out prompts: the best of many candidates looks good on the pairs that made it the best.

Reads artifacts/sft/model, artifacts/align/<member>/model, artifacts/preferences/heldout.parquet and, to choose by
score, artifacts/reward/model. Writes model/: a plain folder for `weights`, a mixture (all members and mixture.json) for
`probabilities`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.data.batching.pairs import PreferencePair
from rlhf_core.engine.batches import ROWS_AT_ONCE
from rlhf_core.errors import ConfigError, DataError, check_finite
from rlhf_core.evaluation.policy_measurement import Policy, PolicyEvaluator, response_token_logprobs
from rlhf_core.evaluation.shares import best_parts, likelihood_to_gain, mixture_likelihood, part_lattice
from rlhf_core.models.mixture import PolicyMixture, averaged_weights
from rlhf_core.models.policy import load_policy, save_policy
from rlhf_core.models.scoring.ensemble import load_reward_model
from rlhf_core.state.rng import StepRng
from rlhf_core.text.tokenizer import load_tokenizer
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.combine.gain import PerPrompt, by_likelihood, gain_figures, halves
from tasks.stages.policy_pairs import policy_pairs
from tasks.stages.texts import text_figures

Shares: TypeAlias = tuple[float, ...]
Measure: TypeAlias = Callable[[Shares], dict[str, float]]


def run(stage: Stage) -> dict[str, Any]:
    """Choose the shares and write the combined policy; returns the figures of `reports/metrics/combine-<method>.json`.

    Raises:
        ConfigError: the members cannot be averaged, or do not write the same tokens.
        DataError: there is no held-out pair to choose by.
    """
    cfg = stage.params.combine
    tokenizer = load_tokenizer(stage.root / paths.SFT / "model")
    members = [load_policy(stage.root / paths.ALIGN / name / "model").to(stage.device) for name in cfg.members]
    _check_vocabulary(members)
    pairs, others = heldout_pairs(stage, tokenizer)
    combine = partial(_combined, stage.item, members)
    measure = _measure(stage, combine, members, pairs, tokenizer)

    alone = [measure(tuple(float(one is other) for other in members)) for one in members]
    lattice = part_lattice(len(members), cfg.parts)
    candidates: list[tuple[Shares, dict[str, float]]] = []
    for number, parts in enumerate(lattice, start=1):
        shares = tuple(part / cfg.parts for part in parts)
        candidates.append((shares, measure(shares)))
        stage.log(number, len(lattice), {"eval/value": candidates[-1][1]["value"]}, 0)

    def named(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(cfg.members, values, strict=True))

    check_finite([figures["value"] for figures in alone], "combine: the value of member")
    best = max(range(len(alone)), key=lambda place: alone[place]["value"])
    shares, chosen = candidates[best_parts(lattice, [figures["value"] for _, figures in candidates])]
    policy = combine(shares)
    if isinstance(policy, PolicyMixture):
        policy.save(tokenizer, stage.out / "model")
    else:
        save_policy(policy, tokenizer, stage.out / "model")
    return {
        "members": list(cfg.members),
        "choose_by": cfg.choose_by,
        "shares": named(shares),
        **chosen,
        "best_member": cfg.members[best],
        **gain_figures(_per_prompt(stage, others, tokenizer), policy, members[best], len(others)),
        "alone": named(alone),
        "measured": [{"shares": named(shares), **figures} for shares, figures in candidates],
        "num_pairs": len(pairs),
        **text_figures(stage),
    }


def _combined(method: str, members: Sequence[PreTrainedModel], shares: Shares) -> Policy:
    if 1.0 in shares:
        return members[shares.index(1.0)]
    return averaged_weights(members, shares) if method == "weights" else PolicyMixture(members, shares).eval()


def _check_vocabulary(members: Sequence[PreTrainedModel]) -> None:
    sizes = {member.get_input_embeddings().weight.shape[0] for member in members}
    if len(sizes) > 1:
        raise ConfigError(f"combine.members: vocabularies of {sorted(sizes)} tokens. Fix: members from one SFT model")


def heldout_pairs(
    stage: Stage, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs that choose the shares, and pairs of other prompts that measure the gain; at most `combine.pairs` each."""
    path, kept = paths.PREFERENCES / "heldout.parquet", policy_pairs(stage, tokenizer, "heldout")
    if not kept:
        raise DataError(f"{path}: no held-out pair to choose shares by. Fix: more held-out prompts, or methods: []")
    choose, measure = halves(kept, torch.randperm(len(kept), generator=_rng(stage)("pairs")).tolist())
    most = stage.params.combine.pairs
    return [kept[row] for row in choose[:most]], [kept[row] for row in measure[:most]]


def _per_prompt(stage: Stage, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> PerPrompt | None:
    """What `gain_over_best_member` compares, in the terms of `combine.choose_by`; None without pairs."""
    if not pairs:
        return None
    if stage.params.combine.choose_by == "likelihood":
        return by_likelihood(pairs, tokenizer.pad_token_id)
    read = _reader(stage, pairs, tokenizer)

    def of(policy: Policy) -> tuple[np.ndarray, np.ndarray]:
        scores, divergence = read(policy)
        return scores - stage.params.combine.kl_coef * divergence, np.ones(len(scores))

    return of


def _rng(stage: Stage) -> StepRng:
    """The same choices for every method: their figures then speak of the same pairs."""
    return StepRng(stage.params.seed, "combine")


def _measure(
    stage: Stage,
    combine: Callable[[Shares], Policy],
    members: Sequence[PreTrainedModel],
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
) -> Measure:
    """What says how good a combination with some shares is: its `value`, and what that is made of."""
    if stage.params.combine.choose_by == "score":
        score = _by_score(stage, pairs, tokenizer)
        return lambda shares: score(combine(shares))
    say = partial(
        response_token_logprobs,
        prompts=[pair.prompt for pair in pairs],
        responses=[pair.chosen for pair in pairs],
        pad_id=tokenizer.pad_token_id,
    )
    if stage.item == "weights":
        return lambda shares: {"value": say(combine(shares)).mean().item()}
    return _of_mixtures(torch.stack([say(member) for member in members]))


def _of_mixtures(logprobs_MT: Tensor) -> Measure:
    """Log-likelihood a token of any mixture, from one pass of each member over the chosen responses."""

    def measure(shares: Shares) -> dict[str, float]:
        value = {"value": mixture_likelihood(logprobs_MT, shares)}
        return value if 1.0 in shares else value | {"likelihood_to_gain": likelihood_to_gain(logprobs_MT, shares)}

    return measure


def _by_score(
    stage: Stage, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Policy], dict[str, float]]:
    """The reward model's mean score less `kl_coef` times the KL to SFT, on own samples: what PPO maximises."""
    read = _reader(stage, pairs, tokenizer)

    def measure(policy: Policy) -> dict[str, float]:
        scores, divergence = read(policy)
        score, kl = fmean(scores.tolist()), float(divergence.mean())
        return {"value": score - stage.params.combine.kl_coef * kl, "choice_score": score, "choice_kl_to_sft": kl}

    return measure


def _reader(
    stage: Stage, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Policy], tuple[np.ndarray, np.ndarray]]:
    """Samples of a policy on the pairs' prompts, one each: scores, and log-probability less that under SFT.

    The same prompts and random numbers for every policy.
    """
    prompts = [list(ids) for ids in dict.fromkeys(tuple(pair.prompt) for pair in pairs)]
    reference = load_policy(stage.root / paths.SFT / "model").to(stage.device)
    reward_model = load_reward_model(stage.root / paths.REWARD / "model").to(stage.device).eval()
    evaluator = PolicyEvaluator(
        tokenizer=tokenizer,
        prompts=prompts,
        max_new_tokens=stage.params.model.max_response_tokens,
        sampled_at_once=ROWS_AT_ONCE,
    )

    def read(policy: Policy) -> tuple[np.ndarray, np.ndarray]:
        responses = evaluator.sample("combined", policy, _rng(stage)("measure"))
        own_N, sft_N = evaluator.logprobs(policy, reference, responses)
        return np.array(evaluator.scores(reward_model, responses)), own_N - sft_N

    return read
