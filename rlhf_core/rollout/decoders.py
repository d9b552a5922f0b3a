"""Token-by-token decoding with a key-value cache: a fast way for what is packed, transformers' own for the rest.

Shape suffixes: B = rows, T = cache places, V = vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.engine.compute import autocast
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.rollout.decoder import Decoder
from rlhf_core.rollout.graphed_decoder import GraphedDecoder
from rlhf_core.rollout.mixture_decoder import MixtureDecoder
from rlhf_core.rollout.static_decoder import StaticDecoder


def make_decoder(model: PreTrainedModel | PolicyMixture) -> Decoder:
    """The fastest decoder that computes exactly what `model` does."""
    if isinstance(model, PolicyMixture):
        return MixtureDecoder([make_decoder(member) for member in model.members], model.shares)
    if not StaticDecoder.supports(model):
        return CacheDecoder(model)
    return GraphedDecoder(model) if model.device.type == "cuda" else StaticDecoder(model)


class CacheDecoder:
    """Any causal language model through its own forward and the library's cache.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        self.cache = DynamicCache(config=self.model.config)
        self.mask_BT = prompts.mask_BS
        self.next_position_B = prompts.mask_BS.sum(1)
        return self._forward(prompts.ids_BS, prompts.position_ids_BS)

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        self.mask_BT = F.pad(self.mask_BT, (0, 1), value=1)
        logits_BV = self._forward(tokens_B[:, None], self.next_position_B[:, None])
        self.next_position_B = self.next_position_B + 1
        return logits_BV

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self.cache.batch_select_indices(rows)
        self.mask_BT, self.next_position_B = self.mask_BT[rows], self.next_position_B[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        with autocast(ids.device):
            return self.model(
                input_ids=ids,
                attention_mask=self.mask_BT,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
