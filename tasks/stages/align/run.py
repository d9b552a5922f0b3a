"""Stage `align@ppo`, `align@dpo` and `align@chain`: the SFT policy, aligned with the reward model, the pairs, or both.

Reads artifacts/sft/model, artifacts/reward/model, artifacts/validate/prompts.parquet (to train with PPO, and to
measure), heldout_prompts.parquet beside it (PPO's guard) and artifacts/preferences/train.parquet (DPO and its
relatives). Writes model/ and samples.json. All algorithms are measured in the same
way: responses of the SFT model and of the aligned one to the same training prompts at temperature 1.
"""

from statistics import fmean as mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.engine.batches import WIDE_ROWS_AT_ONCE
from rlhf_core.evaluation.drift import drift_figures
from rlhf_core.evaluation.intervals import bounds, mean_interval
from rlhf_core.evaluation.policy_measurement import PolicyEvaluator
from rlhf_core.models.adapters import add_adapters, has_adapters, without_adapters
from rlhf_core.models.policy import load_policy, save_policy
from rlhf_core.models.quantise import quantise
from rlhf_core.models.scoring.ensemble import RewardEnsemble, load_reward_model
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.atomic import write_json
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.identity import prompt_id
from rlhf_core.text.tokenizer import load_tokenizer
from rlhf_core.trainers.optimisation import refused_steps
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.align.chain import run_chain
from tasks.stages.align.dpo import run_dpo
from tasks.stages.align.ppo import guard_figures, run_ppo, set_aside_figures
from tasks.stages.align.prompts import training_prompts
from tasks.stages.texts import text_figures

MEASURED_PROMPTS = 256
SHOWN_SAMPLES = 20


def run(stage: Stage) -> dict[str, Any]:
    """Align, then measure against SFT; returns the figures of `reports/metrics/align-<algorithm>.json`.

    Raises:
        DataError: there is nothing to learn from: no training prompt (PPO), no training pair (DPO).
        Diverged: training left the finite numbers.
    """
    tokenizer = load_tokenizer(stage.root / paths.SFT / "model")
    policy = load_policy(stage.root / paths.SFT / "model")
    quantise(policy, stage.params.model, "align")
    policy = policy.to(stage.device)
    add_adapters(policy, stage.params.model.lora_at("align"), stage.rng().integer("adapters"))
    # under adapters the SFT model is the policy itself without them: no second copy of the weights
    reference = policy if has_adapters(policy) else load_policy(stage.root / paths.SFT / "model").to(stage.device)
    reward_model = load_reward_model(stage.root / paths.REWARD / "model").to(stage.device).eval()
    links: dict[str, Any] = {}
    match stage.item:
        case "ppo":
            state = run_ppo(stage, tokenizer, policy, reference, reward_model, stage.params.align.ppo, stage)
        case "dpo":
            state = run_dpo(stage, tokenizer, policy, reference, stage.params.align.dpo, stage)
        case "chain":
            state, links = run_chain(stage, tokenizer, policy, reference, reward_model)
    stage.finish(state)
    save_policy(policy, tokenizer, stage.out / "model")
    metrics, samples = _compare(stage, tokenizer, policy, reference, reward_model)
    write_json(stage.out / "samples.json", samples)
    metrics |= {"steps": state.step, "refused_steps": refused_steps(state)} | set_aside_figures(stage, tokenizer, state)
    return metrics | _last_figures(state) | guard_figures(state) | links | text_figures(stage)


def _compare(
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: RewardModel | RewardEnsemble,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and samples of the aligned policy beside the SFT model, on training prompts at temperature 1."""
    rng, prompts = stage.rng(), training_prompts(stage, tokenizer)
    order = torch.randperm(len(prompts), generator=rng("measured prompts"))[:MEASURED_PROMPTS].tolist()
    texts = [prompts[i][0] for i in order]
    evaluator = PolicyEvaluator(
        tokenizer=tokenizer,
        prompts=[prompts[i][1] for i in order],
        max_new_tokens=stage.params.model.max_response_tokens,
        scored_at_once=WIDE_ROWS_AT_ONCE,
    )
    with without_adapters(reference):
        sft = evaluator.sample("sft", reference, rng("measure/sft"))
    aligned = evaluator.sample("aligned", policy, rng("measure/aligned"))
    sft_scores, scores = (evaluator.scores(reward_model, responses) for responses in (sft, aligned))
    drift = drift_figures(*evaluator.logprobs(policy, reference, aligned), aligned.num_tokens)
    metrics = {f"train_{name}": value for name, value in drift.items()}  # `kl_to_sft` is that of the evaluation prompts
    for suffix, responses, values in (("", aligned, scores), ("_sft", sft, sft_scores)):
        metrics |= {
            f"train_score{suffix}": mean(values),
            **bounds(f"train_score{suffix}", mean_interval(values)),
            f"train_response_tokens{suffix}": mean(responses.num_tokens),
            f"train_finished_share{suffix}": mean(responses.finished),
        }
    samples = [
        {
            "prompt_id": prompt_id(texts[row]),
            "prompt": texts[row],
            "sft": sft.texts[row],
            "sft_score": sft_scores[row],
            "aligned": aligned.texts[row],
            "aligned_score": scores[row],
        }
        for row in range(min(SHOWN_SAMPLES, len(texts)))
    ]
    return metrics | {"num_measured_prompts": len(texts)}, samples


def _last_figures(state: TrainState) -> dict[str, float]:
    """The curves' last row under plain names: `policy/entropy` becomes `last_policy_entropy`."""
    return {
        "last_" + key.replace("/", "_"): value
        for key, value in state.history[-1].items()
        if key.startswith(("loss/", "reward/", "implicit_reward/", "policy/", "rollout/"))
    }
