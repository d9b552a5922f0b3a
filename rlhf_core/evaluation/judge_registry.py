"""The judges of the A/B: how each is asked. Their rows (`rlhf_core.config.evaluation.JUDGE_ROWS`) say the rest.

A pointwise judge scores one response at a time: every model is scored beside its sampling, and two are compared by
their scores. A pairwise judge is shown two responses to a prompt, in both orders, once all of them are there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_core.config.evaluation import JUDGE_ROWS, JudgeName, JudgeRow
from rlhf_core.demo.gold import CRITERIA, Grade
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.evaluation.ab import Judge, Verdicts, both_orders
from rlhf_core.evaluation.judged_set import JudgedSet
from rlhf_core.evaluation.judges import gold_grades, score_judge
from rlhf_core.evaluation.policy_measurement import PolicyEvaluator, ResponseSet
from rlhf_core.evaluation.text_scorers import TextLimits, load_text_scorer
from rlhf_core.models.scoring.ensemble import load_reward_model
from rlhf_core.models.scoring.foreign import UNLIMITED


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What a judge may look at beside responses.

    Attributes:
        prompts: in the order of the responses.
        evaluator: of the same prompts as tokens; how a model reads responses.
        reward_model: folder of the run's reward model.
        device: where a model of the judge may run.
        judge_model: folder of a reward model that is none of the run's.
        max_prompt_tokens: most tokens of a prompt that one of ours reads there.
    """

    prompts: Sequence[str]
    evaluator: PolicyEvaluator
    reward_model: Path
    device: torch.device
    judge_model: Path | None = None
    max_prompt_tokens: int = UNLIMITED

    @property
    def limits(self) -> TextLimits:
        """What a reward model of another run may read of a text."""
        return TextLimits(prompt=self.max_prompt_tokens, response=self.evaluator.max_new_tokens)


class Scored(NamedTuple):
    """A score a response, and the grades that they come from; one judge of a run gives grades."""

    scores: list[float]
    grades: Sequence[Grade] = ()


Compare = Callable[[JudgedSet, JudgedSet], Verdicts]
Compared = Mapping[tuple[str, str, float, str], Verdicts]
"""What a judge says of A against B: by (A, B, temperature, judge)."""


def any_prompts(prompts: Sequence[str]) -> None:
    """Judge whatever there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PointwiseJudge:
    """Scores a response by itself; of two the higher score wins.

    Attributes:
        row: what is known without asking.
        open: made once for a model that is judged; what it returns scores each of the model's response sets.
        refuse: raises ConfigError for prompts that it cannot judge, before anything is sampled.
        always: scores every response, also where it is no judge.
        details: attributes of its grades that are recorded beside its score.
    """

    row: JudgeRow
    open: Callable[[Material], Callable[[ResponseSet], Scored]]
    refuse: Callable[[Sequence[str]], None] = any_prompts
    always: bool = False
    details: tuple[str, ...] = ()

    def compare(self, name: str, material: Material) -> Compare:
        """The judge as a function of two judged sets, which hold its scores."""
        judge = score_judge(self.row.tie_within)
        return lambda a, b: both_orders(judge, material.prompts, a.scores[name], b.scores[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class PairwiseJudge:
    """Compares two responses to one prompt, as text; it is asked in both orders.

    Attributes:
        row: what is known without asking.
        open: made once for all comparisons; what it returns answers a batch of them.
        refuse: raises ConfigError for prompts that it cannot judge, before anything is sampled.
    """

    row: JudgeRow
    open: Callable[[Material], Judge[str]]
    refuse: Callable[[Sequence[str]], None] = any_prompts

    def compare(self, name: str, material: Material) -> Compare:
        """The judge as a function of two judged sets."""
        judge, tie_within = self.open(material), self.row.tie_within
        return lambda a, b: both_orders(judge, material.prompts, a.responses.texts, b.responses.texts, tie_within)


def scoring_judges(asked: Sequence[str]) -> dict[str, PointwiseJudge]:
    """The judges that score every response when `asked` are the judges of the A/B, in the order of the registry."""
    pointwise = {name: judge for name, judge in JUDGES.items() if isinstance(judge, PointwiseJudge)}
    return {name: judge for name, judge in pointwise.items() if judge.always or name in asked}


def judge_sets(asked: Sequence[str], material: Material, sets: Mapping[float, ResponseSet]) -> dict[float, JudgedSet]:
    """The response sets of one model, by temperature, with the score of every judge that gives one."""
    scorers = {name: judge.open(material) for name, judge in scoring_judges(asked).items()}
    judged = {}
    for temperature, responses in sets.items():
        scored = {name: score(responses) for name, score in scorers.items()}
        grades = next((list(one.grades) for one in scored.values() if one.grades), [])
        scores = {name: one.scores for name, one in scored.items()}
        judged[temperature] = JudgedSet(responses=responses, scores=scores, grades=grades)
    return judged


def compare_sets(
    asked: Sequence[JudgeName],
    material: Material,
    judged: Mapping[tuple[str, float], JudgedSet],
    pairs: Iterable[tuple[str, str]],
) -> Compared:
    """What each judge says of the first against the second of each pair of models."""
    compare = {name: JUDGES[name].compare(name, material) for name in asked}
    temperatures = dict.fromkeys(temperature for _, temperature in judged)
    return {
        (a, b, temperature, name): compare[name](judged[a, temperature], judged[b, temperature])
        for a, b in pairs
        for temperature in temperatures
        for name in asked
    }


def model_pairs(candidates: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """Every two models that are compared: each candidate with the baseline, then the candidates with each other."""
    return [*((name, baseline) for name in candidates), *combinations(candidates, 2)]


def compared_numbers(judge: str, a: JudgedSet, b: JudgedSet, verdicts: Verdicts) -> tuple[list[float], list[float]]:
    """What each comparison was decided by: the two scores, or the probabilities that a pairwise judge gives."""
    if judge in a.scores:
        return a.scores[judge], b.scores[judge]
    return verdicts.shares, [1.0 - share for share in verdicts.shares]


def _gold(material: Material) -> Callable[[ResponseSet], Scored]:
    def score(responses: ResponseSet) -> Scored:
        grades = gold_grades(material.prompts, responses.texts, responses.finished)
        return Scored([grade.gold for grade in grades], grades)

    return score


def _refuse_other_worlds(prompts: Sequence[str]) -> None:
    try:
        gold_grades(prompts, [""] * len(prompts), [True] * len(prompts))
    except DataError as error:
        raise ConfigError(
            f"params.yaml: evaluate.judges: 'gold' grades prompts of the demo world only ({error}). "
            "Fix: evaluate.judges: [reward_model]"
        ) from error


def _reward_model(material: Material) -> Callable[[ResponseSet], Scored]:
    model = load_reward_model(material.reward_model).to(material.device).eval()
    return lambda responses: Scored(material.evaluator.scores(model, responses))


def _judge_model(material: Material) -> Callable[[ResponseSet], Scored]:
    if material.judge_model is None:
        raise ConfigError("params.yaml: evaluate.judge_model: no folder. Fix: name one with a reward model")
    score = load_text_scorer(material.judge_model, material.limits, material.device)
    return lambda responses: Scored(score(material.prompts, responses.texts))


JUDGES: Mapping[JudgeName, PointwiseJudge | PairwiseJudge] = {
    "gold": PointwiseJudge(row=JUDGE_ROWS["gold"], open=_gold, refuse=_refuse_other_worlds, details=CRITERIA),
    "reward_model": PointwiseJudge(row=JUDGE_ROWS["reward_model"], open=_reward_model, always=True),
    "judge_model": PointwiseJudge(row=JUDGE_ROWS["judge_model"], open=_judge_model),
}
