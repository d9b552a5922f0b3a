"""Responses on their way from the thread that samples to the loop that sends."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_core.serving.continuous import EndReason, Request, Row, SampledToken
from rlhf_core.serving.served import ServedPolicy
from rlhf_core.serving.text_stream import TextStream


class Piece(NamedTuple):
    """News of one response.

    Attributes:
        choice: which one.
        text: what is certain of it now and was not before.
        sampled: the token that was drawn; None in the last piece.
        reason: why it ended; None while it goes on.
    """

    choice: int
    text: str
    sampled: SampledToken | None
    reason: EndReason | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A response that somebody wants, and the text it is to become."""

    request: Request
    stream: TextStream


class _Reply:
    """A listener that hands on what it hears to the loop."""

    def __init__(self, choice: int, stream: TextStream, generation: "Generation") -> None:
        self._choice, self._stream, self._generation = choice, stream, generation
        self._failed = False

    def token(self, sampled: SampledToken) -> bool:
        """See `Listener`."""
        try:
            text = "" if sampled.is_end else self._stream.push(sampled.token)
        except Exception as error:  # a tokenizer of somebody else's: the other rows have nothing to do with it
            self.fail(error)
            return False
        self._generation.put(Piece(self._choice, text, sampled, None))
        return not self._stream.is_stopped

    def end(self, reason: EndReason) -> None:
        """See `Listener`."""
        if not self._failed:
            self._generation.put(Piece(self._choice, self._stream.finish(), None, reason))

    def fail(self, error: Exception) -> None:
        """See `Listener`."""
        self._failed = True
        self._generation.put(error)


class Generation:
    """The responses to one request.

    Args:
        policy: writes them.
        wanted: what is to be written.

    Raises:
        EnvironmentProblem: the server is going down.
    """

    def __init__(self, policy: ServedPolicy, wanted: Sequence[Wanted]) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._open = len(wanted)
        self._rows: list[Row] = []
        try:
            for number, one in enumerate(wanted):
                self._rows.append(policy.thread.submit(one.request, _Reply(number, one.stream, self)))
        except BaseException:
            self.cancel()
            raise

    def put(self, news: Piece | Exception) -> None:
        """Called in the thread that samples; where the loop is gone nobody listens."""
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)
        except RuntimeError:
            self.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """What there is to tell, until every response has ended. However it is left, no row goes on.

        Raises:
            Exception: one of them failed.
        """
        try:
            while self._open:
                news = await self._news.get()
                if isinstance(news, Exception):
                    raise news
                self._open -= news.reason is not None
                yield news
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Free the rows."""
        for row in self._rows:
            row.cancel()
