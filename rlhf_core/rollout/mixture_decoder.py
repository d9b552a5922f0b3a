"""Token-by-token decoding from a mixture of distributions: every member reads every token.

Shape suffixes: B = rows, V = vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.models.mixture import mixed_logprobs
from rlhf_core.rollout.decoder import Decoder


class MixtureDecoder:
    """Decoders side by side; their next-token logits are the logarithm of the mixed distribution.

    A temperature is applied to the mixture and not to its members.

    Args:
        decoders: one a member.
        shares: how much each counts.
    """

    def __init__(self, decoders: Sequence[Decoder], shares: Sequence[float]) -> None:
        self.decoders, self.shares = decoders, shares

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        return self._mixed([decoder.prefill(prompts, max_new_tokens) for decoder in self.decoders])

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._mixed([decoder.step(tokens_B) for decoder in self.decoders])

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        for decoder in self.decoders:
            decoder.select(rows)

    def _mixed(self, logits: Sequence[Tensor]) -> Tensor:
        return mixed_logprobs([torch.log_softmax(logits_BV.float(), -1) for logits_BV in logits], self.shares)
