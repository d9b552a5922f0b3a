"""Log-probabilities of response tokens under a model.

Logits exist only for the positions that predict a response token, a limited number of them at a time, and always in
at least float32: a log-softmax in bfloat16 is off by more than a policy moves in a step.
Shape suffixes: B = rows, R = response tokens, N = all rows' response tokens without padding, D = hidden,
V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_core.data.batches import SequenceBatch
from rlhf_core.models.mixture import PolicyMixture, mixed_logprobs
from rlhf_core.models.states import predicting_states
from rlhf_core.state.sharding import run_gathered

LOGITS_AT_ONCE = 2**25
"""Most logits that are held at a time: 128 MiB in float32."""

PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose logits are the last hidden states times the output embedding and nothing else."""


def response_logprobs(model: PreTrainedModel | PolicyMixture, batch: SequenceBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of each response token given all before it, logprobs_BR; 0 where there is padding.

    Args:
        model: causal language model on the device of `batch`.
        batch: prompts and responses.
        temperature: logits are divided by it, as they were when the response was sampled.

    Raises:
        ValueError: a mixture, whose temperature would need whole distributions, at another one than 1.
    """
    if isinstance(model, PolicyMixture):
        return _mixed(model, batch, temperature)
    return run_gathered(model, _logprobs_and_entropy, batch, temperature, with_entropy=False)[0]


def response_logprobs_and_entropy(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`response_logprobs`, and the entropy in nats of each distribution, entropy_BR; both carry gradients."""
    return run_gathered(model, _logprobs_and_entropy, batch, temperature, with_entropy=True)


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets_N` where the logits are `hidden_ND @ weight_VD.T`, and entropies (or zeros).

    The logits of all N tokens stand in memory together only where they are few; otherwise each chunk's are made
    again for its gradient.
    """
    chunk = max(1, LOGITS_AT_ONCE // weight_VD.shape[0])
    if len(targets_N) <= chunk:
        return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, temperature, with_entropy)
    pieces = [
        checkpoint(_TokenLogprobs.apply, hidden, weight_VD, targets, temperature, with_entropy, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _logprobs_and_entropy(
    model: PreTrainedModel, batch: SequenceBatch, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    real_BR = batch.mask_BS[:, batch.prompt_width :].bool()
    targets_N = batch.response_ids_BR[real_BR]
    if model.config.model_type in PLAIN_HEADS:
        hidden_ND = predicting_states(model.get_decoder(), batch)
        weight_VD = model.get_output_embeddings().weight
        values_N, entropy_N = token_logprobs(hidden_ND, weight_VD, targets_N, temperature, with_entropy=with_entropy)
    else:
        logits_NV = _logits(model, batch)[real_BR]
        values_N, entropy_N = _from_logits(logits_NV, targets_N, temperature, with_entropy)
    return _scatter(values_N, real_BR), _scatter(entropy_N, real_BR)


def _mixed(mixture: PolicyMixture, batch: SequenceBatch, temperature: float) -> Tensor:
    """A token's probability in a mixture is the mean of its probabilities in the members."""
    if temperature != 1.0:
        raise ValueError(f"temperature {temperature}: log-probabilities of a mixture are known at temperature 1 only")
    members = [response_logprobs(member, batch) for member in mixture.members]
    return mixed_logprobs(members, mixture.shares).masked_fill(batch.response_mask_BR == 0, 0.0)


def _scatter(values_N: Tensor, real_BR: Tensor) -> Tensor:
    """Put values in row order to the real positions; the others get 0."""
    return values_N.new_zeros(real_BR.shape).masked_scatter(real_BR, values_N)


def _logits(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """Logits that predict the response, through the model's own output layer, whatever it does (caps, scales, bias)."""
    room = batch.ids_BS.shape[1] - batch.prompt_width
    return model(
        input_ids=batch.ids_BS,
        attention_mask=batch.mask_BS,
        position_ids=batch.position_ids_BS,
        use_cache=False,
        logits_to_keep=room + 1,
    ).logits[:, :-1]


def _from_logits(logits_NV: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
    logprobs_NV = torch.log_softmax(_at_least_float32(logits_NV) / temperature, -1)
    chosen_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    return chosen_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1) if with_entropy else torch.zeros_like(chosen_N)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _TokenLogprobs(torch.autograd.Function):
    """Output layer, log-softmax and choice of the target in one: the graph keeps one [N, V] tensor instead of three.

    With z = h W^T / T and p = softmax(z), it keeps p, for d log p_y / dz = onehot(y) - p and, of the entropy H,
    dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logits_NV = _at_least_float32(hidden_ND @ weight_VD.to(hidden_ND.dtype).t())
        if temperature != 1.0:
            logits_NV.div_(temperature)
        chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
        largest_N = logits_NV.amax(1)
        shifted_NV = logits_NV.sub_(largest_N[:, None])  # in place, as below: the largest tensors of a step
        entropy_N = torch.zeros_like(chosen_N)
        probs_NV = shifted_NV.exp() if with_entropy else shifted_NV.exp_()
        total_N = probs_NV.sum(1)
        probs_NV.div_(total_N[:, None])
        if with_entropy:
            # H = log sum exp(z - m) - sum p (z - m); p = 0 where z - m is -inf adds nothing
            entropy_N = total_N.log() - (probs_NV * shifted_NV).nan_to_num_(0.0).sum(1)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, probs_NV, entropy_N)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return chosen_N - largest_N - total_N.log(), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, probs_NV, entropy_N = ctx.saved_tensors
        grad_N = gradients[0] / ctx.temperature
        grad_NV = probs_NV * -grad_N[:, None]
        grad_NV.scatter_add_(1, targets_N[:, None], grad_N[:, None])
        if ctx.with_entropy:
            weight_N1 = (gradients[1] / ctx.temperature)[:, None]
            grad_NV -= weight_N1 * (torch.xlogy(probs_NV, probs_NV) + probs_NV * entropy_N[:, None])
        grad_NV = grad_NV.to(hidden_ND.dtype)
        grad_hidden_ND = grad_NV @ weight_VD.to(hidden_ND.dtype) if ctx.needs_input_grad[0] else None
        grad_weight_VD = (grad_NV.t() @ hidden_ND).to(weight_VD.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden_ND, grad_weight_VD, None, None, None
