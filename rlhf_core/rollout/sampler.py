"""Sampling responses: the policy's plain distribution at a temperature, nothing cut off and nothing penalised.

Top-k, top-p or a repetition penalty would make the probability a response was sampled with differ from the one that
training computes for it, and the ratio of the two would carry the difference.
Shape suffixes: N = all prompts, B = rows of a batch in hand, T = new tokens, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.data.batches import SequenceBatch, collate
from rlhf_core.rollout.decoders import Decoder, make_decoder

DROP_SHARE = 0.2
"""Finished rows leave a batch together once they are this share of it: leaving costs a copy of the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Sampled responses, in the order of their prompts.

    Attributes:
        response_ids: tokens, the end token included where one was written.
        logprobs: log-probability of each token in the distribution it was drawn from; at temperature 0, where
            nothing is drawn, in the distribution at temperature 1.
        finished: whether the response ended by itself; others were cut at the limit.
    """

    response_ids: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


@torch.inference_mode()
def sample_responses(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> Samples:
    """Sample one response to each prompt.

    Each row draws from a row of uniform numbers of its own, taken from `generator` at the start, so its response
    does not depend on which rows share its batch (but for rounding of the logits).

    Args:
        model: causal language model; on a GPU where it lies on one.
        prompts: their tokens.
        max_new_tokens: longer responses are cut there and count as not finished.
        temperature: 0 takes the likeliest token each time.
        generator: CPU generator.
        eos_ids: tokens that end a response.
        pad_id: fills prompts of unequal length.
        batch_size: rows decoded at once.

    Raises:
        ValueError: no room for a token, a negative temperature, or a prompt without tokens.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1, temperature {temperature} at least 0")
    uniform_NT = torch.rand(len(prompts), max_new_tokens, generator=generator)
    end_ids = torch.tensor(list(eos_ids), device=model.device)
    decoder = make_decoder(model)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found: dict[int, tuple[list[int], list[float], bool]] = {}
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        tokens_BT, logprobs_BT = _decode(
            decoder,
            collate([prompts[row] for row in rows], [[]] * len(rows), pad_id).to(model.device),
            uniform_NT[rows].to(model.device),
            temperature,
            end_ids,
        )
        for row, tokens, logprobs in zip(rows, tokens_BT.tolist(), logprobs_BT.tolist(), strict=True):
            length = next((place + 1 for place, token in enumerate(tokens) if token in eos_ids), 0)
            length_or_all = length or max_new_tokens
            found[row] = (tokens[:length_or_all], logprobs[:length_or_all], length > 0)
    ordered = [found[row] for row in range(len(prompts))]
    return Samples(
        response_ids=[ids for ids, _, _ in ordered],
        logprobs=[logprobs for _, logprobs, _ in ordered],
        finished=[finished for _, _, finished in ordered],
    )


def _decode(
    decoder: Decoder, prompts: SequenceBatch, uniform_BT: Tensor, temperature: float, end_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Decode one batch; what stands after a row's end token is to be ignored."""
    rows, max_new_tokens = uniform_BT.shape
    tokens_BT = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=uniform_BT.device)
    logprobs_BT = torch.zeros(rows, max_new_tokens, device=uniform_BT.device)
    alive = torch.arange(rows, device=uniform_BT.device)
    done = torch.zeros(rows, dtype=torch.bool, device=uniform_BT.device)
    logits_BV = decoder.prefill(prompts, max_new_tokens)
    for place in range(max_new_tokens):
        tokens_B, logprobs_B = choose_tokens(logits_BV, temperature, uniform_BT[alive, place])
        tokens_BT[alive, place], logprobs_BT[alive, place] = tokens_B, logprobs_B
        done = done | torch.isin(tokens_B, end_ids)
        num_done = int(done.sum())
        if num_done == len(alive) or place == max_new_tokens - 1:
            break
        if num_done > DROP_SHARE * len(alive):
            going = (~done).nonzero()[:, 0]
            decoder.keep(going)
            alive, done, tokens_B = alive[going], done[going], tokens_B[going]
        logits_BV = decoder.step(tokens_B)
    return tokens_BT, logprobs_BT


def choose_tokens(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a token a row by inverting the cumulative distribution at `uniform_B`; 0 temperature takes the largest.

    Returns:
        tokens_B, and their log-probabilities in the distribution drawn from (temperature 1 where it is 0).
    """
    logits_BV = logits_BV.float()
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    logprobs_BV = torch.log_softmax(logits_BV, -1)
    if temperature == 0.0:
        tokens_B = logits_BV.argmax(-1)
    else:
        cumulative_BV = logprobs_BV.exp().cumsum(-1)
        # Rounding leaves the last sum a little off 1: the draw is scaled to it, so every draw finds a token, and
        # `right` skips tokens of probability 0.
        threshold_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
        tokens_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
        tokens_B = tokens_B.clamp_max(logits_BV.shape[1] - 1)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
