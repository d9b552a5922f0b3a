"""Continuous batching (Yu et al. 2022, Orca): requests join rows that are under way, and leave when they are done.

What a row says depends on its prompt, its seed and its settings alone; who else is in the batch moves the last bits of
its logits and nothing more. Shape suffixes: B = rows, V = vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from rlhf_core.errors import Diverged
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.rollout.token_draw import OPEN, CutOff, TokenDraw, draw_tokens
from rlhf_core.serving.slots import make_slots
from rlhf_core.state.rng import StepRng

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One response that somebody waits for.

    Attributes:
        prompt: its tokens.
        max_new_tokens: the longest response, its end token included.
        eos_ids: tokens that end it.
        temperature: 0 takes the likeliest token each time.
        cut_off: which tokens may be drawn.
        seed, number: decide the random numbers, one after the other: a longer response begins as the shorter one does.
            `number` tells responses to one prompt apart.
        alternatives: how many of the likeliest tokens to name at each place.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    cut_off: CutOff = OPEN
    seed: int = 0
    number: int = 0
    alternatives: int = 0


class SampledToken(NamedTuple):
    """A token and its log-probability in the whole distribution at the row's temperature (at 0: at temperature 1).

    `alternatives` are the likeliest tokens there with theirs, as many as were asked for.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    is_end: bool


class Listener(Protocol):
    """Who waits for a response; called in the thread that samples, so it must be quick and must not raise."""

    def token(self, sampled: SampledToken) -> bool:
        """Take a token; False ends the response after it."""
        ...

    def end(self, reason: EndReason) -> None:
        """The response is whole."""
        ...

    def fail(self, error: Exception) -> None:
        """There will be no more of it."""
        ...


@dataclass(eq=False, slots=True)
class Row:
    """A request that waits or is under way; `cancel` may be called by any thread."""

    request: Request
    listener: Listener
    numbers: torch.Generator = field(init=False)
    written: int = 0
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.numbers = StepRng(self.request.seed, "serving")(f"response {self.request.number}")

    def cancel(self) -> None:
        """Nobody waits any more: the row goes before the next token, and the listener hears nothing."""
        self.is_cancelled = True

    def draw(self) -> float:
        """The number in [0, 1) that decides the next token."""
        return torch.rand((), generator=self.numbers).item() if self.request.temperature else 0.0


class ContinuousSampler:
    """Samples responses token by token for whoever is there.

    `submit` may be called by any thread, `step` by one.

    Args:
        model: a policy, on the device where it is to run; use the sampler while it does not change.
        pad_id: fills prompts of unequal length.
        most_rows: that are under way at once; others wait in the order they came.
        most_read: prompt tokens that are read between two tokens of those under way, so that these never wait long; a
            longer prompt is read alone.
    """

    def __init__(
        self, model: PreTrainedModel | PolicyMixture, pad_id: int, *, most_rows: int = 32, most_read: int = 1024
    ) -> None:
        self.model, self.pad_id, self.most_rows, self.most_read = model, pad_id, most_rows, most_read
        self.device = model.device
        self.waiting: deque[Row] = deque()
        self._start()

    def submit(self, request: Request, listener: Listener) -> Row:
        """Let a request wait for its turn."""
        row = Row(request, listener)
        self.waiting.append(row)
        return row

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self.rows and not self.waiting

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row: let go who left, let join who waits, draw, tell, go on."""
        try:
            self._leave({place for place, row in enumerate(self.rows) if row.is_cancelled})
            self._join(self._next())
            if self.rows:
                self._go_on(self._told())
        except Exception as error:
            self.fail_all(error)  # out of memory, say: those who wait have their turn yet

    def fail_all(self, error: Exception, *, waiting: bool = False) -> None:
        """Tell everybody under way that there is no more, and begin with an empty cache.

        Args:
            waiting: those too that wait for their turn.
        """
        rows = self.rows
        self._start()
        while waiting and self.waiting:
            rows = [*rows, self.waiting.popleft()]
        for row in rows:
            if not row.is_cancelled:
                row.listener.fail(error)

    def _start(self) -> None:
        self.rows: list[Row] = []
        self.slots = make_slots(self.model)
        self.logits_BV = torch.empty(0, 0, device=self.device)

    def _next(self) -> list[Row]:
        """Who joins now: in order, while rows are free and their prompts are short enough to be read together."""
        new: list[Row] = []
        free, read = self.most_rows - len(self.rows), 0
        while self.waiting and len(new) < free:
            read += len(self.waiting[0].request.prompt)
            if new and read > self.most_read:
                break
            row = self.waiting.popleft()
            if row.is_cancelled:
                read -= len(row.request.prompt)
            else:
                new.append(row)
        return new

    def _join(self, new: list[Row]) -> None:
        if not new:
            return
        self.rows += new  # first, so that they hear of a failure
        logits_BV = self.slots.join([list(row.request.prompt) for row in new], self.pad_id)
        self.logits_BV = torch.cat([self.logits_BV, logits_BV]) if len(self.logits_BV) else logits_BV

    def _told(self) -> list[int]:
        """Draw a token for every row and tell it; the tokens of those that go on, in their order."""
        drawn = self._drawn()
        gone: set[int] = set()
        for place, (row, sampled) in enumerate(zip(self.rows, drawn, strict=True)):
            if sampled is None or self._is_over(row, sampled):
                gone.add(place)
        tokens = [sampled.token if sampled is not None else 0 for sampled in drawn]
        return [tokens[row] for row in self._leave(gone)]

    def _go_on(self, tokens: list[int]) -> None:
        if tokens:
            self.logits_BV = self.slots.step(torch.tensor(tokens, device=self.device))

    def _leave(self, gone: set[int]) -> list[int]:
        """Give up rows; the old places of those that stay."""
        if not gone:
            return list(range(len(self.rows)))
        places = self.slots.leave(gone)
        self.rows = [self.rows[row] for row in places]
        self.logits_BV = self.logits_BV[places]
        return places

    def _is_over(self, row: Row, sampled: SampledToken) -> bool:
        row.written += 1
        wants_more = row.listener.token(sampled)
        if sampled.is_end or not wants_more:
            row.listener.end("stop")
        elif row.written >= row.request.max_new_tokens:
            row.listener.end("length")
        else:
            return False
        return True

    def _drawn(self) -> list[SampledToken | None]:
        """A token a row; None where its logits are no numbers, which is told to its listener alone."""
        found: list[SampledToken | None] = [None] * len(self.rows)
        by_cut_off: dict[CutOff, list[int]] = {}
        for place, is_finite in enumerate(self.logits_BV.logsumexp(-1).isfinite().tolist()):
            row = self.rows[place]
            if is_finite:
                by_cut_off.setdefault(row.request.cut_off, []).append(place)
            else:
                row.listener.fail(Diverged(NO_NUMBERS))
        for cut_off, places in by_cut_off.items():
            sampled = self._as_sampled(places, self._draw(places, cut_off))
            for place, one in zip(places, sampled, strict=True):
                found[place] = one
        return found

    def _draw(self, places: list[int], cut_off: CutOff) -> TokenDraw:
        temperatures = [self.rows[place].request.temperature for place in places]
        alike = len(set(temperatures)) == 1
        temperature = temperatures[0] if alike else torch.tensor(temperatures, device=self.device)
        uniform_B = torch.tensor([self.rows[place].draw() for place in places], device=self.device)
        logits_BV = self.logits_BV if len(places) == len(self.rows) else self.logits_BV[places]
        return draw_tokens(logits_BV, temperature, uniform_B, cut_off)

    def _as_sampled(self, places: list[int], drawn: TokenDraw) -> list[SampledToken]:
        sampled = []
        for place, token, logprob in zip(places, drawn.tokens_B.tolist(), drawn.logprobs_B.tolist(), strict=True):
            request = self.rows[place].request
            sampled.append(SampledToken(token, logprob, self._alternatives(place), token in request.eos_ids))
        return sampled

    def _alternatives(self, place: int) -> tuple[tuple[int, float], ...]:
        request = self.rows[place].request
        if not request.alternatives:
            return ()
        logprobs_V = torch.log_softmax(self.logits_BV[place].float() / (request.temperature or 1.0), -1)
        best = logprobs_V.topk(min(request.alternatives, len(logprobs_V)))
        return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


NO_NUMBERS = (
    "sampling: the model's logits are NaN or infinite: there is no distribution to draw from. "
    "Fix: look at the model's weights"
)
