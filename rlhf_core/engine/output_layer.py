"""Output layer, log-softmax and choice of a token in one, a few logits at a time.

Logits are float32 at least, whatever the model is computed in: a log-softmax in bfloat16 is off by more than a policy
moves in a step. No more than a piece of them is worked on at a time; for the gradient all of them stay where they are
few, and are made again where they are many. Which of the two changes no bit of the result.
Shape suffixes: N = tokens, D = hidden size, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rlhf_core.engine.kernels import at_least_float32
from rlhf_core.engine.matmul import PIECES, add_outer, back_through, linear, pieces
from rlhf_core.state.compute_mode import compute_mode

PLAIN_HEADS = frozenset(
    {"gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""Architectures whose logits are the last hidden states times the output embedding and nothing else, but for caps."""

KEPT_LOGITS = 2**25
"""Most logits that stay in memory for their gradient: 128 MiB in float32."""

LOGITS_AT_ONCE = 2**20
"""About as many logits are worked on at a time: 4 MiB in float32, which a processor's cache holds."""

LARGE = 2**22
"""Numbers of an output layer that no cache holds: each piece of tokens reads all of it, so pieces are long."""


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are hidden states times the output embedding; with an adapter on that layer they are not."""
    head, config = model.get_output_embeddings(), model.config
    capped = config.to_dict().get("final_logit_softcapping") is not None
    return config.model_type in PLAIN_HEADS and not capped and type(head) is nn.Linear and head.bias is None


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets_N` where the logits are `hidden_ND @ weight_VD.T`, and entropies (or zeros).

    With z = h W^T / T and p = softmax(z): d log p_y / dz = onehot(y) - p, and dH / dz = -p (log p + H) for the
    entropy H.
    """
    learns = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    keep = learns and len(targets_N) * len(weight_VD) <= KEPT_LOGITS
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, temperature, with_entropy, keep)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps exp(z - max z) of all tokens (`keep`), or makes it again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        temperature: float,
        with_entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        largest_N, total_N, chosen_N, entropy_N = at_least_float32(hidden_ND).new_zeros(4, len(targets_N)).unbind()
        kept = []
        for piece in _pieces(hidden_ND, weight_VD):
            logits_NV = _logits(hidden_ND[piece], weight_VD, temperature)
            chosen_N[piece] = logits_NV.gather(1, targets_N[piece, None])[:, 0]
            largest_N[piece] = logits_NV.amax(1)
            shifted_NV = logits_NV.sub_(largest_N[piece, None])  # in place, as below: the largest tensors of a step
            weights_NV = shifted_NV.exp() if with_entropy else shifted_NV.exp_()
            total_N[piece] = weights_NV.sum(1)
            if with_entropy:
                # H = log sum exp(z - m) - sum p (z - m); p = 0 where z - m is -inf adds nothing
                mean_N = (weights_NV * shifted_NV).nan_to_num_(0.0).sum(1) / total_N[piece]
                entropy_N[piece] = total_N[piece].log() - mean_N
            if keep:
                kept.append(weights_NV)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, largest_N, total_N, entropy_N, *kept)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return chosen_N - largest_N - total_N.log(), entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, largest_N, total_N, entropy_N, *kept = ctx.saved_tensors
        grad_N, grad_entropy_N = gradients[0] / ctx.temperature, gradients[1] / ctx.temperature
        grad_hidden_ND = torch.empty_like(hidden_ND)
        wide_VD = at_least_float32(weight_VD).new_zeros(weight_VD.shape) if ctx.needs_input_grad[1] else None
        large = weight_VD.numel() > LARGE and hidden_ND.device.type == "cpu"
        for number, piece in enumerate(_pieces(hidden_ND, weight_VD)):
            if kept:
                weights_NV = kept[number]
            else:
                logits_NV = _logits(hidden_ND[piece], weight_VD, ctx.temperature)
                weights_NV = logits_NV.sub_(largest_N[piece, None]).exp_()
            grad_NV = weights_NV * (-grad_N[piece] / total_N[piece])[:, None]
            grad_NV.scatter_add_(1, targets_N[piece, None], grad_N[piece, None])
            if ctx.with_entropy:
                probs_NV = weights_NV / total_N[piece, None]
                curved_NV = torch.xlogy(probs_NV, probs_NV).addcmul_(probs_NV, entropy_N[piece, None])
                grad_NV.addcmul_(curved_NV, grad_entropy_N[piece, None], value=-1)
            if ctx.needs_input_grad[0] and large:
                grad_hidden_ND[piece] = back_through(grad_NV, at_least_float32(weight_VD))
            elif ctx.needs_input_grad[0]:
                grad_hidden_ND[piece] = _wide_product(grad_NV, weight_VD.t(), hidden_ND.dtype)
            if wide_VD is not None and large:
                add_outer(wide_VD, grad_NV, at_least_float32(hidden_ND[piece]), wide_VD.dtype)
            elif wide_VD is not None:
                wide_VD += _wide_product(grad_NV.t(), hidden_ND[piece].t(), hidden_ND.dtype)
        return grad_hidden_ND, None if wide_VD is None else wide_VD.to(weight_VD.dtype), None, None, None, None


def _pieces(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    """Pieces of tokens whose logits are few; the same with gradients and without, so that bits agree."""
    longest = PIECES[0] if weight_VD.numel() > LARGE else max(PIECES[-1], LOGITS_AT_ONCE // len(weight_VD))
    if hidden_ND.device.type != "cpu":
        longest = max(PIECES[0], KEPT_LOGITS // len(weight_VD))
    wide = at_least_float32(hidden_ND[:0])
    found = []
    for start in range(0, len(hidden_ND), longest):
        count = min(longest, len(hidden_ND) - start)
        found += [slice(start + part.start, start + part.stop) for part in pieces(count, wide, longest)]
    return found


def _logits(hidden_ND: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_NV = _wide_product(hidden_ND, weight_VD, hidden_ND.dtype)
    return logits_NV if temperature == 1.0 else logits_NV.div_(temperature)


def _wide_product(x_NK: Tensor, weight_MK: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T in at least float32; on a GPU from factors in bfloat16 where the model (`dtype`) or the mode is."""
    narrow = torch.bfloat16 in (dtype, weight_MK.dtype) or compute_mode().precision == "bfloat16"
    if narrow and x_NK.device.type == "cuda":
        return torch.mm(x_NK.bfloat16(), weight_MK.bfloat16().t(), out_dtype=torch.float32)
    return linear(at_least_float32(x_NK), at_least_float32(weight_MK))
