"""What a rollout consists of: responses, and what the models say of them, in the parts that they compute together.

Shape suffixes: B = rows of a part, R = response tokens, N = all responses of the rollout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.state.world import World
from rlhf_core.trainers.ppo.replay import Written


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPart:
    """Rows that go through a model together, with what the models said of them when the rollout was made.

    The old log-probabilities and values are computed on this very batch, with its padding, and not copied from the
    sampler: the first update then starts from a log-ratio of exactly 0, and any other number is a bug.

    Attributes:
        rows: their numbers in the rollout.
        last_values_B: of the states that the responses end in: 0 unless they were cut and `advantages.truncated` is
            `bootstrap`.
        scores_B: the reward model's.
        weights_BR: importance of each token, 1 for a response of this rollout (see `rlhf_core.trainers.ppo.replay`).
        counts_B: 0 for a row that stands in for one that was set aside (`rlhf_core.trainers.ppo.aside`), else 1.
    """

    rows: list[int]
    batch: SequenceBatch
    old_logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    old_values_BR: Tensor
    last_values_B: Tensor
    entropy_BR: Tensor
    scores_B: Tensor
    weights_BR: Tensor
    counts_B: Tensor

    @property
    def mask_BR(self) -> Tensor:
        """1 for response tokens that are learned from and measured."""
        return self.batch.response_mask_BR * self.counts_B[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """All processes know the responses, each holds the parts that it computes.

    Attributes:
        responses: fresh ones first, replayed ones behind them, the responses to one prompt beside each other.
        num_fresh: how many are fresh.
        minibatches: this process's parts of each minibatch; fresh and replayed responses share none. None at all
            where no fresh response counts.
        tokens: response tokens of each minibatch that count, over all processes.
        aside: numbers of the responses that were set aside, and why.
    """

    responses: list[Written]
    num_fresh: int
    minibatches: list[list[RolloutPart]]
    tokens: list[int]
    aside: Mapping[int, str] = field(default_factory=dict)

    @property
    def counted_fresh(self) -> list[int]:
        """Numbers of the fresh responses that count."""
        return [row for row in range(self.num_fresh) if row not in self.aside]

    def parts(self) -> list[RolloutPart]:
        """This process's parts of all minibatches."""
        return [part for parts in self.minibatches for part in parts]

    def gather(self, numbers: Sequence[Tensor], world: World) -> Tensor:
        """Numbers of this process's rows, a tensor each of `parts()`, brought together: numbers_N, float64, on the CPU.

        Every process gets the same.
        """
        filled_N = torch.zeros(len(self.responses), dtype=torch.float64)
        for part, numbers_B in zip(self.parts(), numbers, strict=True):
            filled_N[part.rows] = numbers_B.double().cpu()
        return world.total(filled_N)
