"""Sampling responses: at one or several temperatures, from the whole distribution or its likeliest part.

Training computes the plain log-probability of a token, at the sampling temperature and over the whole vocabulary.
Under top-k or top-p a token was drawn with a larger probability, by the factor 1 / (share of what was kept). `Samples`
holds both, so that whoever learns from such responses can correct for it; PPO samples from the plain distribution.
Shape suffixes: N = all rows, B = rows of a batch in hand, T = new tokens, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.engine.batches import collate
from rlhf_core.engine.memory import fitting_to_write
from rlhf_core.engine.packed_weight import GRAIN
from rlhf_core.models.policy import eos_token_ids
from rlhf_core.rollout.decoder import Decoder
from rlhf_core.rollout.decoders import make_decoder
from rlhf_core.rollout.token_draw import OPEN, CutOff, TokenDraw, checked_logprobs, draw_tokens
from rlhf_core.state.compute_mode import compute_mode

DROP_SHARE = 0.2
"""Finished rows leave a batch together once this share of it can: leaving costs a copy of the cache."""

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}
"""How often finished rows are counted: each count waits until the device has computed all that was asked of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are written: where they end, what stands in their place, how long they may become.

    Attributes:
        eos_ids: tokens that end a response.
        pad_id: fills prompts of unequal length; may be an end token.
        max_new_tokens: the longest response, its end token included.

    Raises:
        ValueError: a response could have no token.
    """

    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")

    @classmethod
    def of(cls, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> "Sampling":
        """As a policy and its tokenizer say."""
        ends = eos_token_ids(policy, tokenizer)
        return cls(eos_ids=ends, pad_id=tokenizer.pad_token_id, max_new_tokens=max_new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Sampled responses, in the order of their prompts.

    Attributes:
        response_ids: tokens, the end token included where one was written.
        logprobs: log-probability of each token in the whole distribution at the row's temperature; at temperature
            0, where nothing is drawn, in the distribution at temperature 1.
        behaviour_logprobs: log-probability of each token in the distribution it was drawn from, cut off and
            renormalised: `logprobs` where nothing is cut off, 0 where nothing is drawn.
        finished: whether the response ended by itself; others were cut at the limit.
    """

    response_ids: list[list[int]]
    logprobs: list[list[float]]
    behaviour_logprobs: list[list[float]]
    finished: list[bool]


def sample_responses(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    temperature: float | Sequence[float],
    generator: torch.Generator,
    batch_size: int,
    cut_off: CutOff = OPEN,
) -> Samples:
    """`sample_rows` with random numbers from `generator`: one response to each prompt, a row of numbers each."""
    uniform_NT = torch.rand(len(prompts), sampling.max_new_tokens, generator=generator)
    return sample_rows(
        model, prompts, uniform_NT, sampling, temperature=temperature, batch_size=batch_size, cut_off=cut_off
    )


@torch.inference_mode()
def sample_rows(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    uniform_NT: Tensor,
    sampling: Sampling,
    *,
    temperature: float | Sequence[float],
    batch_size: int,
    cut_off: CutOff = OPEN,
) -> Samples:
    """Sample one response to each prompt, of at most T tokens, from numbers that are given.

    A row's response depends on its prompt, its numbers and its temperature, not on which rows share its batch (but
    for rounding of the logits). Prompts that come several times are read once.

    Args:
        model: causal language model; on a GPU where it lies on one.
        prompts: their tokens.
        uniform_NT: numbers in [0, 1) that decide the tokens, a row each; T is `sampling.max_new_tokens`.
        sampling: where responses end, and how long they may become.
        temperature: one for all, or one a row; 0 takes the likeliest token each time.
        batch_size: most rows decoded at once, where the process sets no number (`ComputeMode.sampled_rows`) and
            memory holds them (`rlhf_core.engine.memory`).
        cut_off: which tokens may be drawn.

    Raises:
        ValueError: a negative temperature, not one a row, not a number a token, or a prompt without tokens.
        Diverged: the model's logits are not numbers.
    """
    temperatures = [float(temperature)] * len(prompts) if isinstance(temperature, int | float) else list(temperature)
    if len(temperatures) != len(prompts) or any(one < 0 for one in temperatures):
        raise ValueError(f"temperature {temperature} must be at least 0, and one number or one for each prompt")
    if uniform_NT.shape != (len(prompts), sampling.max_new_tokens):
        wanted = f"{len(prompts)} responses of at most {sampling.max_new_tokens} tokens"
        raise ValueError(f"{tuple(uniform_NT.shape)} random numbers for {wanted}")
    decoder = make_decoder(model)
    end_V = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=model.device)
    end_V[list(sampling.eos_ids)] = True
    found: dict[int, tuple[list[int], list[float], list[float], bool]] = {}
    batches = _batches(prompts, compute_mode().sampled_rows or batch_size)
    for rows in fitting_to_write(model, batches, prompts, sampling.max_new_tokens):
        growing = _Growing(uniform_NT[rows].to(model.device), [temperatures[row] for row in rows])
        _decode(decoder, growing, [prompts[row] for row in rows], sampling.pad_id, end_V, cut_off)
        for row, response in zip(rows, growing.responses(sampling.eos_ids), strict=True):
            found[row] = response
    ordered = [found[row] for row in range(len(prompts))]
    return Samples(
        response_ids=[row[0] for row in ordered],
        logprobs=[row[1] for row in ordered],
        behaviour_logprobs=[row[2] for row in ordered],
        finished=[row[3] for row in ordered],
    )


def _batches(prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Rows that are decoded together: of similar length, equal prompts side by side, batches of nearly equal size.

    The longest come first: later batches find room in the memory of the first. Sizes are multiples of `GRAIN` but for
    the last, where that makes no more batches: other numbers of rows cost as much as the next multiple.
    """
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), prompts[row]))
    num_batches = -(-len(order) // max(1, batch_size))
    size = -(-len(order) // max(1, num_batches))
    rounded = -(-size // GRAIN) * GRAIN
    size = rounded if rounded <= batch_size else size
    for start in range(0, len(order), max(1, size)):
        yield order[start : start + size]


def _decode(
    decoder: Decoder, growing: "_Growing", prompts: Sequence[list[int]], pad_id: int, end_V: Tensor, cut_off: CutOff
) -> None:
    """Grow the rows of one batch until each has ended or is as long as allowed."""
    device, last = end_V.device, growing.max_new_tokens - 1
    logits_BV = _prefill(decoder, prompts, pad_id, growing.max_new_tokens, device)
    for place in range(growing.max_new_tokens):
        chosen = draw_tokens(logits_BV, growing.temperature, growing.draws_TB[place], cut_off)
        growing.add(place, chosen, end_V)
        if place == last:
            return
        tokens_B = chosen.tokens_B
        if place % STEPS_BETWEEN_LOOKS[device.type] == 0:
            num_rows, num_done = len(growing.done_B), int(growing.done_B.sum())
            if num_done == num_rows:
                return
            kept = -((num_done - num_rows) // GRAIN) * GRAIN
            if num_rows - kept > DROP_SHARE * num_rows:
                going = growing.done_B.int().argsort(stable=True)[:kept]  # finished ones fill up the number
                decoder.select(going)
                growing.select(going)
                tokens_B = tokens_B[going]
        logits_BV = decoder.step(tokens_B)


def _prefill(
    decoder: Decoder, prompts: Sequence[list[int]], pad_id: int, max_new_tokens: int, device: torch.device
) -> Tensor:
    """Read each different prompt once, then go on with as many copies of it as there are rows."""
    place_of: dict[tuple[int, ...], int] = {}
    row_of = [place_of.setdefault(tuple(prompt), len(place_of)) for prompt in prompts]
    different = [list(prompt) for prompt in place_of]
    logits_BV = decoder.prefill(collate(different, [[]] * len(different), pad_id).to(device), max_new_tokens)
    if len(different) == len(prompts):
        return logits_BV
    rows = torch.tensor(row_of, device=device)
    decoder.select(rows)
    return logits_BV[rows]


class _Growing:
    """The responses of a batch, and what the rows that still grow need.

    Args:
        uniform_BT: numbers that decide the tokens.
        temperatures: one a row.
    """

    def __init__(self, uniform_BT: Tensor, temperatures: Sequence[float]) -> None:
        rows, self.max_new_tokens = uniform_BT.shape
        device = uniform_BT.device
        self.tokens_TB = torch.zeros(self.max_new_tokens, rows, dtype=torch.int64, device=device)
        self.logprobs_TB = torch.zeros(self.max_new_tokens, rows, device=device)
        self.behaviour_TB = torch.zeros_like(self.logprobs_TB)
        self.number_B = torch.arange(rows, device=device)
        self.draws_TB = uniform_BT.t().contiguous()
        self.done_B = torch.zeros(rows, dtype=torch.bool, device=device)
        alike = len(set(temperatures)) == 1
        self.temperature: float | Tensor = temperatures[0] if alike else torch.tensor(temperatures, device=device)

    def add(self, place: int, chosen: TokenDraw, end_V: Tensor) -> None:
        """Note the tokens at `place`, and which rows they end."""
        self.tokens_TB[place].index_copy_(0, self.number_B, chosen.tokens_B)
        self.logprobs_TB[place].index_copy_(0, self.number_B, chosen.logprobs_B)
        self.behaviour_TB[place].index_copy_(0, self.number_B, chosen.behaviour_logprobs_B)
        self.done_B |= end_V[chosen.tokens_B]

    def select(self, going: Tensor) -> None:
        """Go on with these rows only."""
        self.number_B, self.done_B = self.number_B[going], self.done_B[going]
        self.draws_TB = self.draws_TB[:, going]
        if isinstance(self.temperature, Tensor):
            self.temperature = self.temperature[going]

    def responses(self, eos_ids: Sequence[int]) -> Iterator[tuple[list[int], list[float], list[float], bool]]:
        """Tokens, both kinds of log-probabilities and whether it ended by itself, cut after the first end token."""
        columns = (self.tokens_TB, self.logprobs_TB, self.behaviour_TB)
        checked_logprobs(self.logprobs_TB)
        for tokens, logprobs, behaviour in zip(*(column.t().tolist() for column in columns), strict=True):
            length = next((place + 1 for place, token in enumerate(tokens) if token in eos_ids), 0)
            kept = length or len(tokens)
            yield tokens[:kept], logprobs[:kept], behaviour[:kept], length > 0
