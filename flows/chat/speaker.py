"""A version that one talks with: its turns and the text of its answers as it grows."""

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_core.errors import DataError
from rlhf_core.rollout.token_draw import CutOff
from rlhf_core.serving.continuous import EndReason, Request, SampledToken
from rlhf_core.serving.served import ServedPolicy
from rlhf_core.serving.text_stream import TextStream, reply_stream
from rlhf_core.text.normal import REFUSED_CHARACTERS, without_hidden
from rlhf_core.text.tool_turns import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How answers are written.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        cut_off: which tokens may be drawn.
        max_tokens: of an answer.
        seed: with the number of the question it decides the random numbers.
    """

    temperature: float
    cut_off: CutOff
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Spoken:
    """An answer.

    Attributes:
        text: as it was shown.
        ending: why it is no longer: `stop` by itself, `length` at the limit, `interrupted` by Ctrl-C.
        turns_left_out: how many of the oldest turns did not fit.
    """

    text: str
    ending: str
    turns_left_out: int


class _Heard:
    """A listener that puts what it hears where another thread takes it."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.news: queue.SimpleQueue[str | tuple[EndReason, str] | Exception] = queue.SimpleQueue()

    def token(self, sampled: SampledToken) -> bool:
        """See `Listener`."""
        if not sampled.is_end and (text := self.stream.push(sampled.token)):
            self.news.put(text)
        return True

    def end(self, reason: EndReason) -> None:
        """See `Listener`."""
        self.news.put((reason, self.stream.finish()))

    def fail(self, error: Exception) -> None:
        """See `Listener`."""
        self.news.put(error)


def speak(
    policy: ServedPolicy, turns: Sequence[Message], manner: Manner, number: int, show: Callable[[str], None]
) -> Spoken:
    """Have a version answer, and show the answer while it grows.

    Args:
        turns: the dialogue, the user's turn last.
        number: of the question in this session.
        show: is given each piece, free of what moves a terminal's cursor.

    Raises:
        DataError: the template refuses the dialogue, or its last turn alone is too long.
        Diverged: the model's logits are no numbers.
    """
    room = min(manner.max_tokens, policy.places // 2)
    prompt, left_out = _fitting(policy, list(turns), policy.places - room)
    heard = _Heard(reply_stream(policy.tokenizer))
    request = Request(
        prompt=prompt,
        max_new_tokens=room,
        eos_ids=policy.eos_ids,
        temperature=manner.temperature,
        cut_off=manner.cut_off,
        seed=manner.seed,
        number=number,
    )
    row = policy.thread.submit(request, heard)
    text, ending = "", "interrupted"
    try:
        while ending == "interrupted":
            news = heard.news.get()
            if isinstance(news, Exception):
                raise news
            if isinstance(news, tuple):
                ending, news = news
            piece = shown(news)
            text += piece
            show(piece)
    except KeyboardInterrupt:
        row.cancel()
    return Spoken(text=text, ending=ending, turns_left_out=left_out)


def shown(text: str) -> str:
    """A model's text without what a terminal would obey and nobody would see."""
    return REFUSED_CHARACTERS.sub("", without_hidden(text))


def _fitting(policy: ServedPolicy, turns: list[Message], most: int) -> tuple[list[int], int]:
    """Tokens of a dialogue, its oldest turns left out until it fits; never the system's nor the last."""
    first = 1 if turns[0]["role"] == "system" else 0
    left_out = 0
    while len(prompt := policy.texts.of_messages(turns)) > most:
        if len(turns) - first < 3:
            raise DataError(f"this question has {len(prompt)} tokens, and {most} fit. Fix: a shorter one, or /new")
        del turns[first : first + 2]
        left_out += 2
    return prompt, left_out
