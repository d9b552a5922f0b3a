"""What the models say of a batch: log-probabilities, entropies and values, by one forward pass a body.

Rollout and update both ask here, so that the update's first log-ratio is 0 to the bit.
Shape suffixes: B = rows, R = response tokens, N = response tokens of all rows without padding, D = hidden.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.engine.states import final_states
from rlhf_core.models.adapters import without_adapters
from rlhf_core.models.scoring.value import ValueHead, ValueModel
from rlhf_core.rollout.logprobs import (
    response_logprobs,
    response_logprobs_and_entropy,
    response_logprobs_and_states,
)
from rlhf_core.state.sharding import run_gathered


class PolicyOutputs(NamedTuple):
    """What the policy says of the response tokens; padding has 0.

    Attributes:
        logprobs_BR: of the tokens.
        entropy_BR: of the distribution that each was drawn from; zeros where it was not asked for.
        states_ND: where they are predicted, for a value head on the same body; None where there is no such head.
    """

    logprobs_BR: Tensor
    entropy_BR: Tensor
    states_ND: Tensor | None


def shares_trunk(modules: Mapping[str, nn.Module]) -> bool:
    """Whether the value model is a head on the policy's own states."""
    return isinstance(modules.get("value"), ValueHead)


def policy_outputs(
    modules: Mapping[str, nn.Module], batch: SequenceBatch, temperature: float, *, with_entropy: bool = False
) -> PolicyOutputs:
    """Ask the policy about a batch; where gradients are recorded, entropies have one too."""
    policy = modules["policy"]
    if shares_trunk(modules):
        return PolicyOutputs(*response_logprobs_and_states(policy, batch, temperature, with_entropy=with_entropy))
    if with_entropy:
        return PolicyOutputs(*response_logprobs_and_entropy(policy, batch, temperature), None)
    logprobs_BR = response_logprobs(policy, batch, temperature)
    return PolicyOutputs(logprobs_BR, torch.zeros_like(logprobs_BR), None)


def values_of(modules: Mapping[str, nn.Module], batch: SequenceBatch, outputs: PolicyOutputs) -> Tensor:
    """Values before each response token was written, values_BR: of a model of its own, or from the policy's states."""
    value = modules["value"]
    return value(batch) if outputs.states_ND is None else value(outputs.states_ND, batch)


def last_values_of(modules: Mapping[str, nn.Module], batch: SequenceBatch) -> Tensor:
    """Values of the states that the responses end in, last_values_B."""
    if shares_trunk(modules):
        states_BD = run_gathered(modules["policy"], lambda policy: final_states(policy.get_decoder(), batch))
        return run_gathered(modules["value"], ValueHead.after_last, states_BD)
    return run_gathered(modules["value"], ValueModel.after_last, batch)


def reference_token_logprobs(
    policy: nn.Module, reference: nn.Module, batch: SequenceBatch, temperature: float
) -> Tensor:
    """Log-probabilities under the reference: a model of its own, or the policy with its adapters set aside."""
    if reference is not policy:
        return response_logprobs(reference, batch, temperature)
    with without_adapters(policy):
        return response_logprobs(policy, batch, temperature)
