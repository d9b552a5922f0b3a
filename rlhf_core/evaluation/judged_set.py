"""What the judges make of one model's responses to the evaluation prompts at one temperature."""

from dataclasses import dataclass, field

from rlhf_core.demo.gold import Grade
from rlhf_core.evaluation.policy_measurement import ResponseSet


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedSet:
    """A response set with its scores by judge, and the gold grades where gold is a judge."""

    responses: ResponseSet
    scores: dict[str, list[float]]
    grades: list[Grade] = field(default_factory=list)
