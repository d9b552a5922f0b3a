"""Value model: what the rest of a response is worth, seen from each position that predicts a token.

Shape suffixes: B = rows, R = response tokens, N = all rows' response tokens without padding, D = hidden size.
"""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.engine.states import final_states, predicting_states
from rlhf_core.models.scoring.reward_model import RewardModel


class ValueModel(nn.Module):
    """A decoder of its own with a scalar head that starts at zero.

    Args:
        body: decoder without output layer.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body
        self.scalar = _zero_scalar(body.config.hidden_size)

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel) -> "ValueModel":
        """A value model on a copy of the reward model's body (Ouyang et al. 2022, appendix C.4), with a new head.

        The head is not copied: a reward model's scalar speaks of a finished response (or of one token's share), a
        value of what is still to come.
        """
        return cls(copy.deepcopy(reward_model.body)).to(reward_model.shift.device).eval()

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Value before each response token is written, values_BR, float32; padding has 0.

        The value of token t is read at the position that predicts it, so it knows nothing of the token itself.
        """
        return _values(self.scalar, predicting_states(self.body, batch), batch)

    def after_last(self, batch: SequenceBatch) -> Tensor:
        """Value of the state that each response ends in, values_B, float32: what might still come were it to go on."""
        return self.scalar(final_states(self.body, batch))[:, 0].float()


class ValueHead(nn.Module):
    """A scalar that starts at zero, on states that the policy's own body has made: one forward pass for both.

    Args:
        hidden_size: D of the policy.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.scalar = _zero_scalar(hidden_size)

    def forward(self, states_ND: Tensor, batch: SequenceBatch) -> Tensor:
        """Values as of `ValueModel`, from what `predicting_states` gives; its gradient goes on into the body."""
        return _values(self.scalar, states_ND, batch)

    def after_last(self, states_BD: Tensor) -> Tensor:
        """As of `ValueModel`, from what `final_states` gives."""
        return self.scalar(states_BD)[:, 0].float()


def _zero_scalar(hidden_size: int) -> nn.Linear:
    scalar = nn.Linear(hidden_size, 1)
    nn.init.zeros_(scalar.weight)
    nn.init.zeros_(scalar.bias)
    return scalar


def _values(scalar: nn.Linear, states_ND: Tensor, batch: SequenceBatch) -> Tensor:
    values_N = scalar(states_ND)[:, 0].float()
    real_BR = batch.mask_BS[:, batch.prompt_width :].bool()
    return values_N.new_zeros(real_BR.shape).masked_scatter(real_BR, values_N)
