"""What every decoder does for the sampler.

Shape suffixes: B = rows, V = vocabulary.
"""

from typing import Protocol

from torch import Tensor

from rlhf_core.engine.batches import SequenceBatch


class Decoder(Protocol):
    """Next-token logits for a batch of growing rows."""

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """Read the prompts, make room for new tokens, return logits_BV of the first."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row, return logits_BV of the next."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these rows in this order; a row that is named twice goes on twice."""
        ...
