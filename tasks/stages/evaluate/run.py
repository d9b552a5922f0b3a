"""Stage `evaluate`: every aligned or combined policy against the SFT model on held-out prompts.

Prompts are the last `evaluate.num_prompts` of the held-out ones. Each model writes one response a prompt at each
temperature; the random stream of a response set is addressed by model and temperature, so the SFT model and a
candidate never share one. Every judge sees each pair in both orders; a pair judged differently in the two is a tie.
Divergence from the SFT model is measured on samples at temperature 1, drawn for it where no comparison uses it. Models
are evaluated side by side, each in a process of its own; the figures do not depend on it.

Reads artifacts/validate/heldout_prompts.parquet, artifacts/sft/model, artifacts/align/<candidate>/model and
artifacts/reward/model, whose score of every response is recorded also where it is no judge. Writes responses.parquet,
comparisons.parquet and samples.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_core.config.watched import PLACEHOLDER
from rlhf_core.errors import DataError
from rlhf_core.evaluation import samples
from rlhf_core.evaluation.drift import drift_figures
from rlhf_core.evaluation.judge_registry import (
    JUDGES,
    Compared,
    Material,
    compare_sets,
    compared_numbers,
    judge_sets,
    model_pairs,
)
from rlhf_core.evaluation.judged_set import JudgedSet
from rlhf_core.evaluation.policy_measurement import Policy, PolicyEvaluator, ResponseSet
from rlhf_core.evaluation.text_scorers import count_scored_texts
from rlhf_core.evaluation.verdict import SFT, evaluation_metrics
from rlhf_core.models.mixture import load_any_policy
from rlhf_core.state.atomic import write_json
from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.tokenizer import encode_prompts, load_tokenizer
from tasks import paths
from tasks.frame.at_once import at_once
from tasks.frame.stage import Stage
from tasks.frame.workers import Tell, in_turn, side_by_side
from tasks.stages.evaluate.rows import COMPARISONS, comparison_rows, response_rows, responses_schema
from tasks.stages.texts import count_texts, text_figures, warn_of_texts
from tasks.tables import read_table, write_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """What is known of one model before it is compared.

    Attributes:
        judged: its responses with scores, by temperature.
        drift: its divergence from the SFT model.
    """

    judged: dict[float, JudgedSet]
    drift: dict[str, Any]


def run(stage: Stage) -> dict[str, Any]:
    """Sample, judge and compare; returns the figures of `reports/metrics/evaluate.json`."""
    names = (SFT, *stage.params.candidates)
    evaluated = _all_models(stage, names)
    prompts = _evaluation_prompts(stage)
    material = _material(stage, prompts, count_texts(stage, "prompts"))
    if material.judge_model is not None:
        _count_for_the_judge(stage, material, evaluated)
    warn_of_texts(stage)
    judged = {(name, temperature): one for name in names for temperature, one in evaluated[name].judged.items()}
    pairs, asked = model_pairs(stage.params.candidates, SFT), stage.params.evaluate.judges
    compared = compare_sets(asked, material, judged, pairs)
    write_table(stage.out / "responses.parquet", response_rows(prompts, judged, asked), responses_schema(asked))
    write_table(stage.out / "comparisons.parquet", comparison_rows(prompts, judged, compared), COMPARISONS)
    drift = {name: evaluated[name].drift for name in names}
    metrics = evaluation_metrics(stage.params.evaluate, stage.params.candidates, judged, compared, drift, _tasks(stage))
    write_json(stage.out / "samples.json", _samples(stage, prompts, judged, compared, metrics["verdict"]["best"]))
    return metrics | text_figures(stage)


def _all_models(stage: Stage, names: Sequence[str]) -> dict[str, Evaluated]:
    """Evaluate each model, on a CPU side by side as far as the machine allows; nothing is computed before."""
    jobs = {name: partial(_one_model, stage, name) for name in names}
    total, counts = len(names) * len(_sampled_at(stage)), [0, 0]  # of response sets; sets and tokens so far

    def tell(tokens: int) -> None:
        counts[:] = counts[0] + 1, counts[1] + tokens
        stage.log(counts[0], total, {"eval/response_sets": counts[0]}, counts[1])

    at_most = at_once(stage.params, stage.root) if stage.device.type == "cpu" else 1
    return side_by_side(jobs, tell, at_most=at_most) if at_most > 1 else in_turn(jobs, tell)


def _material(stage: Stage, prompts: Sequence[str], counts: TextCounts | None = None) -> Material:
    """What judges may look at; `counts` is told what the prompts lose when they are encoded."""
    tokenizer, limits = load_tokenizer(stage.root / paths.SFT / "model"), stage.params.model
    evaluator = PolicyEvaluator(
        tokenizer=tokenizer,
        prompts=encode_prompts(tokenizer, prompts, limits.max_prompt_tokens, counts),
        max_new_tokens=limits.max_response_tokens,
    )
    folder = stage.root / paths.REWARD / "model"
    judge_model = stage.params.evaluate.judge_model
    return Material(
        prompts=prompts,
        evaluator=evaluator,
        reward_model=folder,
        device=stage.device,
        judge_model=None if judge_model == PLACEHOLDER else stage.root / judge_model,
        max_prompt_tokens=limits.max_prompt_tokens,
    )


def _count_for_the_judge(stage: Stage, material: Material, evaluated: Mapping[str, Evaluated]) -> None:
    """Count what prompts and responses lost when the judge's own tokenizer read them."""
    counts, folder = count_texts(stage, "the judge's rows"), material.judge_model
    for one in (judged for model in evaluated.values() for judged in model.judged.values()):
        if folder is not None:
            count_scored_texts(folder, material.limits, material.prompts, one.responses.texts, counts)


def _one_model(stage: Stage, name: str, tell: Tell) -> Evaluated:
    """Sample, judge and measure one model; tells the tokens of each response set."""
    prompts = _evaluation_prompts(stage)
    for judge in stage.params.evaluate.judges:
        JUDGES[judge].refuse(prompts)
    model = _load(stage, name)
    material = _material(stage, prompts)
    sets = _sample_all(stage, name, model, material.evaluator, tell)
    compared = {temperature: sets[temperature] for temperature in stage.params.evaluate.temperatures}
    judged = judge_sets(stage.params.evaluate.judges, material, compared)
    logprobs = material.evaluator.logprobs(model, model if name == SFT else _load(stage, SFT), sets[1.0])
    drift = drift_figures(*logprobs, sets[1.0].num_tokens, stage.params.evaluate.confidence)
    return Evaluated(judged=judged, drift=drift)


def _sampled_at(stage: Stage) -> Sequence[float]:
    """Temperatures that responses are drawn at: those that are compared, and 1, at which drift is measured."""
    return tuple(dict.fromkeys((*stage.params.evaluate.temperatures, 1.0)))


def _samples(
    stage: Stage,
    prompts: Sequence[str],
    judged: Mapping[tuple[str, float], JudgedSet],
    compared: Compared,
    best: str,
) -> list[dict[str, Any]]:
    settings = stage.params.evaluate
    first, judge = settings.temperatures[0], settings.judges[0]
    ours, theirs = compared_numbers(judge, judged[best, first], judged[SFT, first], compared[best, SFT, first, judge])
    return samples.side_by_side(
        prompts,
        {name: one for (name, temperature), one in judged.items() if temperature == first},
        best=best,
        gains=[one - other for one, other in zip(ours, theirs, strict=True)],
        count=settings.num_samples,
        generator=stage.rng()("samples"),
    )


def _evaluation_rows(stage: Stage) -> list[dict[str, Any]]:
    path = paths.VALIDATE / "heldout_prompts.parquet"
    rows = read_table(stage.root / path).to_list()
    if not rows:
        raise DataError(f"{path}: no held-out prompts. Fix: set data.heldout_prompts or data.heldout_share")
    return rows[-stage.params.evaluate.num_prompts :]


def _evaluation_prompts(stage: Stage) -> list[str]:
    return [row["prompt"] for row in _evaluation_rows(stage)]


def _tasks(stage: Stage) -> list[str]:
    """The task of each prompt, which says whether it should be refused."""
    return [row["task"] or "" for row in _evaluation_rows(stage)]


def _load(stage: Stage, name: str) -> Policy:
    folder = paths.SFT if name == SFT else paths.ALIGN / name
    return load_any_policy(stage.root / folder / "model").to(stage.device).eval()


def _sample_all(
    stage: Stage, name: str, model: Policy, evaluator: PolicyEvaluator, tell: Tell
) -> dict[float, ResponseSet]:
    sets, rng = {}, stage.rng()
    for temperature in _sampled_at(stage):
        generator = rng(f"sample/{name}/{temperature:g}")
        sets[temperature] = evaluator.sample(name, model, generator, temperature=temperature)
        tell(sum(sets[temperature].num_tokens))
    return sets
