"""Log-probabilities through an architecture's own output layer, whatever it does: a bias, caps, scales, adapters.

The model's own forward is run with its decoder replaced by one that returns given states, so that what happens to them
is what that class of transformers does. A few tokens at a time, and again in the backward pass, so that neither pass
holds more than a piece of [tokens, vocabulary].
Shape suffixes: N = tokens, D = hidden size, V = vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_core.engine.compute import autocast
from rlhf_core.engine.kernels import at_least_float32

LOGITS_AT_ONCE = 2**22
"""About as many logits are worked on at a time: 16 MiB in float32."""

LEAST_TOKENS = 64
"""A piece is no shorter, however large the vocabulary: each piece costs a gradient of the whole output layer."""

_known: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class _GivenStates(BaseModelOutputWithPast):
    """What a decoder returns, but for all that is not states: caches, attentions, routing; architectures differ."""

    def __getattr__(self, name: str) -> None:
        return None


def takes_states(model: PreTrainedModel) -> bool:
    """Whether the logits of a token depend on its state alone, as `own_logits` needs; tried once a model.

    It is tried on four tokens: their logits by the plain forward must be those of their states given in another order.
    Where they are not, a line says so. Parameters must be at hand (see `rlhf_core.state.sharding.run_gathered`).
    """
    if model not in _known:
        problem = _problem(model)
        _known[model] = problem is None
        if problem is not None:
            print(f"{type(model).__name__}: logits of all response tokens at a time, for {problem}", flush=True)
    return _known[model]


def own_logits(model: PreTrainedModel, states_ND: Tensor) -> Tensor:
    """Logits of last hidden states (as the decoder returns them), logits_NV, in at least float32.

    On a CPU they are computed in the type of the output layer's weights; on a GPU in the precision of the mode.
    """
    with autocast(states_ND.device) if states_ND.is_cuda else torch.autocast("cpu", enabled=False):
        return at_least_float32(_output(model, states_ND))


def own_token_logprobs(
    model: PreTrainedModel,
    states_ND: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """As of `output_layer.token_logprobs`, through the model's own output layer."""

    def piece(some_ND: Tensor, some_N: Tensor) -> tuple[Tensor, Tensor]:
        return chosen_and_entropy(own_logits(model, some_ND), some_N, temperature, with_entropy)

    parts = []
    longest = max(LEAST_TOKENS, LOGITS_AT_ONCE // len(model.get_output_embeddings().weight))
    for some_ND, some_N in zip(states_ND.split(longest), targets_N.split(longest), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(piece, some_ND, some_N, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(piece(some_ND, some_N))
    chosen, entropies = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(entropies)


def chosen_and_entropy(
    logits_NV: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and entropies (or zeros), of whole logits."""
    logprobs_NV = torch.log_softmax(at_least_float32(logits_NV) / temperature, -1)
    chosen_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    return chosen_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1) if with_entropy else torch.zeros_like(chosen_N)


def _output(model: PreTrainedModel, states_ND: Tensor) -> Tensor:
    """logits_NV; the model's hooks are not called, for those of FSDP would gather and free its weights."""
    ids_1N = torch.zeros(1, len(states_ND), dtype=torch.long, device=states_ND.device)  # for their shape
    given_1ND = states_ND[None].to(model.get_output_embeddings().weight.dtype)
    with _decoder_returns(model.get_decoder(), given_1ND):
        return model.forward(input_ids=ids_1N, use_cache=False, return_dict=True).logits[0]


@contextmanager
def _decoder_returns(body: Any, states_1ND: Tensor) -> Iterator[None]:
    """For the time of a `with`, calling the decoder computes nothing and gives these states."""
    shadowed = body.__dict__.get("forward")
    body.forward = lambda *_, **__: _GivenStates(last_hidden_state=states_1ND)
    try:
        yield
    finally:
        del body.forward
        if shadowed is not None:
            body.forward = shadowed


@torch.no_grad()
def _problem(model: PreTrainedModel) -> str | None:
    """Why the logits of states given by themselves would not be those of the plain forward; None: they are."""
    device = model.get_output_embeddings().weight.device
    ids_1N = torch.arange(1, 5, device=device)[None]
    order = [2, 0, 3]
    try:
        with torch.autocast(device.type, enabled=False):
            states_1ND = model.get_decoder()(input_ids=ids_1N, use_cache=False).last_hidden_state
            plain_NV = model.forward(input_ids=ids_1N, use_cache=False, return_dict=True).logits[0, order]
            own_NV = _output(model, states_1ND[0, order])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"its forward does not take states for its decoder's ({type(error).__name__}: {error})"
    bound = 64 * torch.finfo(plain_NV.dtype).eps * max(1.0, plain_NV.abs().max().item())
    apart = (own_NV - plain_NV).abs().max().item()
    return None if apart <= bound else f"logits of the same states differ by {apart:.2g}"
