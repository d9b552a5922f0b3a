"""How much memory log-probabilities take, counted in tensors and not in time."""

from typing import Any

import pytest
import torch
from support.memory import Memory
from torch import Tensor

from rlhf_core.engine import output_layer
from rlhf_core.engine.output_layer import token_logprobs

TOKENS, WIDTH, VOCABULARY = 512, 64, 4096
LOGITS = 4 * TOKENS * VOCABULARY  # bytes


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator) for n in (TOKENS, VOCABULARY))
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def measure(function: Any, *, learns: bool) -> Memory:
    hidden, weight, targets = inputs()
    with Memory() as memory, torch.set_grad_enabled(learns):
        found = function(hidden, weight, targets)
        if learns:
            found.sum().backward()
    return memory


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets)[0]


def test_the_plain_form_is_seen_to_hold_three_tensors_of_logits() -> None:
    """Logits, log-probabilities, and a gradient of them: so the counting counts."""
    found = measure(plain, learns=True)
    assert found.largest == LOGITS
    assert found.peak >= 3 * LOGITS


@pytest.mark.parametrize("learns", [True, False])
def test_log_probabilities_never_need_all_logits(monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    """No tensor of [tokens, vocabulary], with gradients or without; less than one such tensor in all."""
    monkeypatch.setattr(output_layer, "KEPT_LOGITS", 0)
    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", 2**18)
    found = measure(chunked, learns=learns)
    assert found.largest <= 4 * 2**18
    assert found.peak < LOGITS


def test_where_logits_are_few_they_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and no second tensor of all of them beside: about half of what the plain form holds."""
    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", 2**18)
    found = measure(chunked, learns=True)
    assert found.largest <= 4 * 2**18
    assert LOGITS <= found.peak < 1.6 * LOGITS
    assert found.peak < 0.52 * measure(plain, learns=True).peak
