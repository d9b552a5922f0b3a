"""Stage `evaluate`: every aligned or combined policy against the SFT model on held-out prompts.

Prompts are the last `evaluate.num_prompts` of the held-out ones. Each model writes one response a prompt at each
temperature; the random stream of a response set is addressed by model and temperature, so the SFT model and a
candidate never share one. Every judge sees each pair in both orders; a pair judged differently in the two is a tie.
Divergence from the SFT model is measured on samples at temperature 1, drawn for it where no comparison uses it. Models
are evaluated side by side, each in a process of its own; the figures do not depend on it.

Reads artifacts/validate/heldout_prompts.parquet, artifacts/sft/model, artifacts/align/<candidate>/model and, for the
judge `reward_model`, artifacts/reward/model. Writes responses.parquet, comparisons.parquet and samples.json.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.data.reading.records import prompt_id
from rlhf_core.demo.gold import CRITERIA
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.evaluation import samples
from rlhf_core.evaluation.ab import TIE_WITHIN, Verdicts, both_orders
from rlhf_core.evaluation.drift import drift_figures, response_logprob_sums
from rlhf_core.evaluation.judges import gold_grades, reward_scores, score_judge
from rlhf_core.evaluation.response_set import JudgedSet, ResponseSet, sample_response_set
from rlhf_core.evaluation.verdict import SFT, evaluation_metrics
from rlhf_core.models.mixture import PolicyMixture, load_any_policy
from rlhf_core.models.scoring.ensemble import load_reward_model
from rlhf_core.state.atomic import write_json
from rlhf_core.text.tokenizer import encode_prompts, load_tokenizer
from tasks import paths
from tasks.frame.at_once import at_once
from tasks.frame.stage import Stage
from tasks.frame.workers import Tell, in_turn, side_by_side
from tasks.stages.texts import count_texts, text_figures, warn_of_texts
from tasks.tables import read_table, write_table

SAMPLING_BATCH = 256
SCORING_BATCH = 64  # on two cores twice as fast as 256, whose activations leave the cache

_TEXT, _NUMBER = pa.string(), pa.float64()
RESPONSES = pa.schema(
    [
        pa.field("model", _TEXT, nullable=False),
        pa.field("temperature", _NUMBER, nullable=False),
        pa.field("prompt_id", _TEXT, nullable=False),
        pa.field("prompt", _TEXT, nullable=False),
        pa.field("response", _TEXT, nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("gold", _NUMBER),
        *(pa.field(name, _NUMBER) for name in CRITERIA),
        pa.field("reward_model", _NUMBER),
    ]
)
COMPARISONS = pa.schema(
    [
        pa.field("model", _TEXT, nullable=False),
        pa.field("temperature", _NUMBER, nullable=False),
        pa.field("judge", _TEXT, nullable=False),
        pa.field("prompt_id", _TEXT, nullable=False),
        pa.field("score", _NUMBER, nullable=False),
        pa.field("sft_score", _NUMBER, nullable=False),
        pa.field("outcome", _TEXT, nullable=False),
    ]
)


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
    _count_prompts(stage, prompts)
    judged = {(name, temperature): one for name in names for temperature, one in evaluated[name].judged.items()}
    compared: dict[tuple[str, float, str], Verdicts] = {
        (name, temperature, judge): both_orders(
            score_judge(TIE_WITHIN[judge]),
            prompts,
            judged[name, temperature].scores[judge],
            judged[SFT, temperature].scores[judge],
        )
        for name in stage.params.candidates
        for temperature in stage.params.evaluate.temperatures
        for judge in stage.params.evaluate.judges
    }
    write_table(stage.out / "responses.parquet", _response_rows(prompts, judged), RESPONSES)
    write_table(stage.out / "comparisons.parquet", _comparison_rows(prompts, judged, compared), COMPARISONS)
    drift = {name: evaluated[name].drift for name in names}
    metrics = evaluation_metrics(stage.params.evaluate, stage.params.candidates, judged, compared, drift, _tasks(stage))
    write_json(stage.out / "samples.json", _samples(stage, prompts, judged, metrics["verdict"]["best"]))
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


def _count_prompts(stage: Stage, prompts: Sequence[str]) -> None:
    """What the prompts lose when they are encoded, which every model does for itself, perhaps in its own process."""
    limit, tokenizer = stage.params.model.max_prompt_tokens, load_tokenizer(stage.root / paths.SFT / "model")
    encode_prompts(tokenizer, prompts, limit, count_texts(stage, "prompts"))
    warn_of_texts(stage)


def _one_model(stage: Stage, name: str, tell: Tell) -> Evaluated:
    """Sample, judge and measure one model; tells the tokens of each response set."""
    prompts = _evaluation_prompts(stage)
    if "gold" in stage.params.evaluate.judges:
        _require_demo_world(prompts)
    model = _load(stage, name)
    tokenizer = load_tokenizer(stage.root / paths.SFT / "model")
    encoded = encode_prompts(tokenizer, prompts, stage.params.model.max_prompt_tokens)
    sets = _sample_all(stage, name, model, tokenizer, encoded, tell)
    compared = {temperature: sets[temperature] for temperature in stage.params.evaluate.temperatures}
    judged = _judge_all(stage, prompts, encoded, compared, tokenizer.pad_token_id)
    sft = model if name == SFT else _load(stage, SFT)
    under_sft = _summed(sft, encoded, sets[1.0], tokenizer.pad_token_id)
    under_policy = under_sft if name == SFT else _summed(model, encoded, sets[1.0], tokenizer.pad_token_id)
    drift = drift_figures(under_policy, under_sft, sets[1.0].num_tokens, stage.params.evaluate.confidence)
    return Evaluated(judged=judged, drift=drift)


def _sampled_at(stage: Stage) -> Sequence[float]:
    """Temperatures that responses are drawn at: those that are compared, and 1, at which drift is measured."""
    return tuple(dict.fromkeys((*stage.params.evaluate.temperatures, 1.0)))


def _samples(
    stage: Stage, prompts: Sequence[str], judged: dict[tuple[str, float], JudgedSet], best: str
) -> list[dict[str, Any]]:
    settings = stage.params.evaluate
    first = settings.temperatures[0]
    return samples.side_by_side(
        prompts,
        {name: one for (name, temperature), one in judged.items() if temperature == first},
        best=best,
        baseline=SFT,
        judge=settings.judges[0],
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


def _load(stage: Stage, name: str) -> PreTrainedModel | PolicyMixture:
    folder = paths.SFT if name == SFT else paths.ALIGN / name
    return load_any_policy(stage.root / folder / "model").to(stage.device).eval()


def _sample_all(
    stage: Stage,
    name: str,
    model: PreTrainedModel | PolicyMixture,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    tell: Tell,
) -> dict[float, ResponseSet]:
    sets, rng = {}, stage.rng()
    for temperature in _sampled_at(stage):
        sets[temperature] = sample_response_set(
            name,
            model,
            tokenizer,
            prompts,
            temperature=temperature,
            max_new_tokens=stage.params.model.max_response_tokens,
            batch_size=SAMPLING_BATCH,
            generator=rng(f"sample/{name}/{temperature:g}"),
        )
        tell(sum(sets[temperature].num_tokens))
    return sets


def _judge_all(
    stage: Stage,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    sets: dict[float, ResponseSet],
    pad_id: int,
) -> dict[float, JudgedSet]:
    judges = stage.params.evaluate.judges
    model = load_reward_model(stage.root / paths.REWARD / "model").to(stage.device).eval()
    judged = {}
    for temperature, responses in sets.items():
        grades = gold_grades(prompts, responses.texts, responses.finished) if "gold" in judges else []
        scores = {"gold": [grade.gold for grade in grades]} if grades else {}
        scores["reward_model"] = reward_scores(
            model, encoded, responses.response_ids, pad_id=pad_id, batch_size=SCORING_BATCH
        )
        judged[temperature] = JudgedSet(responses=responses, scores=scores, grades=grades)
    return judged


def _require_demo_world(prompts: Sequence[str]) -> None:
    """Refuse the judge `gold` for other data now, before minutes of sampling."""
    try:
        gold_grades(prompts, [""] * len(prompts), [True] * len(prompts))
    except DataError as error:
        raise ConfigError(
            f"params.yaml: evaluate.judges: 'gold' grades prompts of the demo world only ({error}). "
            "Fix: evaluate.judges: [reward_model]"
        ) from error


def _summed(
    model: PreTrainedModel | PolicyMixture, prompts: Sequence[list[int]], responses: ResponseSet, pad_id: int
) -> np.ndarray:
    return response_logprob_sums(model, prompts, responses.response_ids, pad_id=pad_id, batch_size=SCORING_BATCH)


def _response_rows(prompts: Sequence[str], judged: dict[tuple[str, float], JudgedSet]) -> Iterator[dict[str, Any]]:
    for (name, temperature), one in judged.items():
        for row, prompt in enumerate(prompts):
            grade = one.grades[row] if one.grades else None
            yield {
                "model": name,
                "temperature": temperature,
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "response": one.responses.texts[row],
                "num_tokens": len(one.responses.response_ids[row]),
                "finished": one.responses.finished[row],
                "gold": grade.gold if grade else None,
                **{name: getattr(grade, name) if grade else None for name in CRITERIA},
                "reward_model": one.scores["reward_model"][row],
            }


def _comparison_rows(
    prompts: Sequence[str],
    judged: dict[tuple[str, float], JudgedSet],
    compared: dict[tuple[str, float, str], Verdicts],
) -> Iterator[dict[str, Any]]:
    for (name, temperature, judge), verdicts in compared.items():
        for row, prompt in enumerate(prompts):
            yield {
                "model": name,
                "temperature": temperature,
                "judge": judge,
                "prompt_id": prompt_id(prompt),
                "score": judged[name, temperature].scores[judge][row],
                "sft_score": judged[SFT, temperature].scores[judge][row],
                "outcome": verdicts.outcomes[row],
            }
