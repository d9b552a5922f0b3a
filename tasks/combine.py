"""Stage `combine@weights` and `combine@probabilities`: two aligned policies made into one.

How much each counts is chosen on held-out preference pairs, which neither trained on and which are not the prompts of
the A/B comparison. Both members are measured in the same way, so that the figures say whether the combination is
worth it. Reads artifacts/sft/model, artifacts/align/<member>/model, artifacts/preferences/heldout.parquet and, to
choose by score, artifacts/reward/model. Writes model/: a plain folder for `weights`, a mixture (both members and
mixture.json) for `probabilities`.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import CombineConfig
from rlhf_core.data.pairs import PreferencePair
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.evaluation.drift import drift_figures, summed_logprobs
from rlhf_core.evaluation.judges import reward_scores
from rlhf_core.evaluation.response_set import sample_response_set
from rlhf_core.models.mixture import PolicyMixture, averaged_weights
from rlhf_core.models.policy import load_policy, save_policy
from rlhf_core.models.reward_ensemble import load_reward_model
from rlhf_core.models.tokenizer import load_tokenizer
from rlhf_core.state.rng import StepRng
from tasks import paths
from tasks.policy_pairs import policy_pairs
from tasks.stage import Stage

BATCH_SIZE = 64
Policy: TypeAlias = PreTrainedModel | PolicyMixture
Measure = Callable[[Policy], dict[str, float]]


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
    pairs = _heldout_pairs(stage, tokenizer)
    measure = _by_likelihood(pairs, tokenizer) if cfg.choose_by == "likelihood" else _by_score(stage, pairs, tokenizer)

    def combine(share: float) -> Policy:
        shares = (1.0 - share, share)
        if stage.item == "weights":
            return averaged_weights(members, shares)
        return PolicyMixture(members, shares).eval()

    measured = [{"share": 0.0, **measure(members[0])}]
    for number, share in enumerate(cfg.shares, start=1):
        measured.append({"share": share, **measure(combine(share))})
        stage.log(number, len(cfg.shares), {"eval/value": measured[-1]["value"]}, 0)
    measured.append({"share": 1.0, **measure(members[1])})
    chosen = max(measured[1:-1], key=lambda row: row["value"])  # the first of equals
    policy = combine(chosen["share"])
    if isinstance(policy, PolicyMixture):
        policy.save(tokenizer, stage.out / "model")
    else:
        save_policy(policy, tokenizer, stage.out / "model")
    return _figures(cfg, measured, chosen) | {"num_pairs": len(pairs)}


def _figures(cfg: CombineConfig, measured: list[dict[str, float]], chosen: dict[str, float]) -> dict[str, Any]:
    best_member = max(measured[0]["value"], measured[-1]["value"])
    return {
        "members": list(cfg.members),
        "choose_by": cfg.choose_by,
        "second_share": chosen["share"],
        **{name: value for name, value in chosen.items() if name != "share"},
        "gain_over_better_member": chosen["value"] - best_member,
        "measured": measured,
    }


def _check_vocabulary(members: Sequence[PreTrainedModel]) -> None:
    sizes = {member.get_input_embeddings().weight.shape[0] for member in members}
    if len(sizes) > 1:
        raise ConfigError(f"combine.members: vocabularies of {sorted(sizes)} tokens. Fix: members from one SFT model")


def _heldout_pairs(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[PreferencePair]:
    path, kept = paths.PREFERENCES / "heldout.parquet", policy_pairs(stage, tokenizer, "heldout")
    if not kept:
        raise DataError(f"{path}: no held-out pair to choose shares by. Fix: more held-out prompts, or methods: []")
    order = torch.randperm(len(kept), generator=_rng(stage)("pairs"))[: stage.params.combine.pairs]
    return [kept[i] for i in order.tolist()]


def _rng(stage: Stage) -> StepRng:
    """The same choices for every method: their figures then speak of the same pairs."""
    return StepRng(stage.params.seed, "combine")


def _by_likelihood(pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> Measure:
    """Log-likelihood of the chosen responses, per token: how well a policy speaks for what people chose."""
    rows = ([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
    tokens = sum(map(len, rows[1]))

    def measure(policy: Policy) -> dict[str, float]:
        sums = summed_logprobs(policy, *rows, pad_id=tokenizer.pad_token_id, batch_size=BATCH_SIZE)
        return {"value": float(sums.sum()) / tokens}

    return measure


def _by_score(stage: Stage, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> Measure:
    """The reward model's mean score less `kl_coef` times the KL to SFT, on own samples: what PPO maximises.

    The same prompts and random numbers for every policy.
    """
    prompts = [list(ids) for ids in dict.fromkeys(tuple(pair.prompt) for pair in pairs)]
    reference = load_policy(stage.root / paths.SFT / "model").to(stage.device)
    reward_model = load_reward_model(stage.root / paths.REWARD / "model").to(stage.device).eval()
    options: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "batch_size": BATCH_SIZE}

    def measure(policy: Policy) -> dict[str, float]:
        responses = sample_response_set(
            "combined",
            policy,
            tokenizer,
            prompts,
            temperature=1.0,
            max_new_tokens=stage.params.model.max_response_tokens,
            batch_size=BATCH_SIZE,
            generator=_rng(stage)("measure"),
        )
        rows = (prompts, responses.response_ids)
        score = fmean(reward_scores(reward_model, *rows, **options))
        own, sft = (summed_logprobs(model, *rows, **options) for model in (policy, reference))
        kl = drift_figures(own, sft, responses.num_tokens)["kl_to_sft"]
        return {"value": score - stage.params.combine.kl_coef * kl, "score": score, "kl_to_sft": kl}

    return measure
