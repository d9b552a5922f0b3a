"""A reward model from elsewhere in the place of one that reads tokens: what PPO is rewarded by.

Shape suffixes: B = rows.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.models.scoring.foreign import ForeignRewardModel
from rlhf_core.text.tokenizer import decode_response


class ReadAsText(nn.Module):
    """Scores batches of the policy's tokens by their texts.

    Args:
        model: reads texts.
        tokenizer: the policy's.
        prompts: every prompt that may come, as text and as the policy's tokens: a template cannot be read backwards.
    """

    def __init__(
        self, model: ForeignRewardModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[tuple[str, list[int]]]
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.texts: dict[tuple[int, ...], str] = {}
        for text, ids in prompts:
            self.texts.setdefault(tuple(ids), text)  # of prompts that are cut to the same tokens the first

    @torch.no_grad()
    def forward(self, batch: SequenceBatch) -> Tensor:
        """Score each response, scores_B, float32.

        Raises:
            ValueError: a prompt is none of those that were given.
        """
        prompts, responses, start = [], [], batch.prompt_width
        for ids_S, before, after in zip(
            batch.ids_BS.tolist(), batch.shapes.prompts, batch.shapes.responses, strict=True
        ):
            prompt = tuple(ids_S[start - before : start])
            if prompt not in self.texts:
                raise ValueError(f"a prompt of {before} tokens whose text is not known: {list(prompt)[:20]}")
            prompts.append(self.texts[prompt])
            responses.append(decode_response(self.tokenizer, ids_S[start : start + after]))
        return torch.tensor(self.model.score_texts(prompts, responses, len(prompts)), device=batch.ids_BS.device)
