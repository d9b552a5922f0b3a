"""Log-probabilities of response tokens under a model.

Logits exist only for the positions that predict a response token, a limited number of them at a time, and always in
at least float32: `output_layer` where they are a plain product of states, `own_output` where a model does more.
Shape suffixes: B = rows, R = response tokens, N = all rows' response tokens without padding, D = hidden,
V = vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.engine.compute import own_forward
from rlhf_core.engine.kernels import at_least_float32
from rlhf_core.engine.output_layer import has_plain_head, token_logprobs
from rlhf_core.engine.own_output import chosen_and_entropy, own_logits, own_token_logprobs, takes_states
from rlhf_core.engine.states import predicting_states
from rlhf_core.models.mixture import PolicyMixture, mixed_logprobs
from rlhf_core.state.sharding import run_gathered

MIXED_LOGITS_AT_ONCE = 2**22
"""About as many logits of a member are in memory at a time where a mixture is scored at another temperature than 1."""


def response_logprobs(model: PreTrainedModel | PolicyMixture, batch: SequenceBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of each response token given all before it, logprobs_BR; 0 where there is padding.

    Args:
        model: causal language model on the device of `batch`.
        batch: prompts and responses.
        temperature: logits are divided by it, as they were when the response was sampled.

    A mixture's logits are the logarithm of its mixed distribution; at another temperature than 1 it needs whole
    distributions of every member, some tokens at a time.
    """
    if isinstance(model, PolicyMixture):
        return _mixed(model, batch, temperature)
    return run_gathered(model, _logprobs_and_entropy, batch, temperature, with_entropy=False)[0]


def response_logprobs_and_entropy(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`response_logprobs`, and the entropy in nats of each distribution, entropy_BR; both carry gradients."""
    return run_gathered(model, _logprobs_and_entropy, batch, temperature, with_entropy=True)


def response_logprobs_and_states(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies (or zeros), and the states they are read from, states_ND, for a head beside.

    One forward pass, but for a model whose logits are not of these states alone (see `own_output`): two there.
    """
    return run_gathered(model, _logprobs_and_states, batch, temperature, with_entropy=with_entropy)


def _logprobs_and_states(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    states_ND = predicting_states(model.get_decoder(), batch)
    if _reads_states(model):
        return *_from_states(model, states_ND, batch, temperature, with_entropy), states_ND
    return *_logprobs_and_entropy(model, batch, temperature, with_entropy=with_entropy), states_ND


def _logprobs_and_entropy(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    if _reads_states(model):
        states_ND = predicting_states(model.get_decoder(), batch)
        return _from_states(model, states_ND, batch, temperature, with_entropy)
    real_BR = batch.mask_BS[:, batch.prompt_width :].bool()
    logits_NV, targets_N = _logits(model, batch)[real_BR], batch.response_ids_BR[real_BR]
    values_N, entropy_N = chosen_and_entropy(logits_NV, targets_N, temperature, with_entropy)
    return _scatter(values_N, real_BR), _scatter(entropy_N, real_BR)


def _from_states(
    model: PreTrainedModel, states_ND: Tensor, batch: SequenceBatch, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    real_BR = batch.mask_BS[:, batch.prompt_width :].bool()
    targets_N = batch.response_ids_BR[real_BR]
    if has_plain_head(model):
        weight_VD = model.get_output_embeddings().weight
        values_N, entropy_N = token_logprobs(states_ND, weight_VD, targets_N, temperature, with_entropy=with_entropy)
    else:
        values_N, entropy_N = own_token_logprobs(model, states_ND, targets_N, temperature, with_entropy=with_entropy)
    return _scatter(values_N, real_BR), _scatter(entropy_N, real_BR)


def _reads_states(model: PreTrainedModel) -> bool:
    """Whether logits can be made of states a few at a time; for hardly any architecture they cannot."""
    return has_plain_head(model) or takes_states(model)


def _mixed(mixture: PolicyMixture, batch: SequenceBatch, temperature: float) -> Tensor:
    """log softmax(log p / T), p the mean of the members' distributions; at T = 1 the chosen tokens alone are needed."""
    if temperature == 1.0:
        members = [response_logprobs(member, batch) for member in mixture.members]
        return mixed_logprobs(members, mixture.shares).masked_fill(batch.response_mask_BR == 0, 0.0)
    real_BR = batch.mask_BS[:, batch.prompt_width :].bool()
    targets_N = batch.response_ids_BR[real_BR]
    distributions = [_distributions(member, batch, real_BR) for member in mixture.members]
    longest = max(1, MIXED_LOGITS_AT_ONCE // len(mixture.get_output_embeddings().weight))
    values = []
    for start in range(0, max(1, len(targets_N)), longest):
        piece = slice(start, start + longest)
        mixed_NV = mixed_logprobs([distribution(piece) for distribution in distributions], mixture.shares)
        values.append(chosen_and_entropy(mixed_NV, targets_N[piece], temperature, with_entropy=False)[0])
    return _scatter(torch.cat(values), real_BR)


def _distributions(model: PreTrainedModel, batch: SequenceBatch, real_BR: Tensor) -> Callable[[slice], Tensor]:
    """Gives logprobs_NV of every token of the vocabulary for a piece of the response tokens."""
    if not _reads_states(model):
        logits_NV = _logits(model, batch)[real_BR]
        return lambda piece: torch.log_softmax(at_least_float32(logits_NV[piece]), -1)
    states_ND = predicting_states(model.get_decoder(), batch)
    if not has_plain_head(model):
        return lambda piece: torch.log_softmax(own_logits(model, states_ND[piece]), -1)
    weight_VD = model.get_output_embeddings().weight

    def logprobs(piece: slice) -> Tensor:
        with torch.autocast(states_ND.device.type, enabled=False):
            return torch.log_softmax(F.linear(at_least_float32(states_ND[piece]), at_least_float32(weight_VD)), -1)

    return logprobs


def _scatter(values_N: Tensor, real_BR: Tensor) -> Tensor:
    """Put values in row order to the real positions; the others get 0."""
    return values_N.new_zeros(real_BR.shape).masked_scatter(real_BR, values_N)


def _logits(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Logits that predict the response, through the model's own output layer, whatever it does (caps, scales, bias)."""
    room = batch.ids_BS.shape[1] - batch.prompt_width
    with own_forward(model, batch.ids_BS.device):
        return model(
            input_ids=batch.ids_BS,
            attention_mask=batch.mask_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
            logits_to_keep=room + 1,
        ).logits[:, :-1]
