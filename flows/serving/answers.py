"""Answers in the form of OpenAI's interface, whole and in pieces."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from flows.serving.generation import Piece
from rlhf_core.serving.continuous import SampledToken
from rlhf_core.serving.served import ServedPolicy
from rlhf_core.serving.text_stream import HALF, plain_decoder

Json = dict[str, Any]


class Answer(ABC):
    """One request's answer as it grows.

    Args:
        policy: who writes it.
        prompt_tokens: of all prompts.
        choices: how many responses there are.
        logprobs: whether log-probabilities are wanted.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(self, policy: ServedPolicy, prompt_tokens: int, choices: int, *, logprobs: bool) -> None:
        self.policy, self.prompt_tokens, self.logprobs = policy, prompt_tokens, logprobs
        self.decode = plain_decoder(policy.tokenizer)
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.texts, self.reasons = [""] * choices, [""] * choices
        self.sampled: list[list[SampledToken]] = [[] for _ in range(choices)]

    def take(self, piece: Piece) -> None:
        """Note a piece."""
        self.texts[piece.choice] += piece.text
        if piece.sampled is not None:
            self.sampled[piece.choice].append(piece.sampled)
        if piece.reason is not None:
            self.reasons[piece.choice] = piece.reason

    def body(self) -> Json:
        """The whole answer."""
        choices = [
            {
                "index": number,
                **self._content(text),
                "logprobs": self._logprobs(sampled) if self.logprobs else None,
                "finish_reason": reason,
            }
            for number, (text, sampled, reason) in enumerate(zip(self.texts, self.sampled, self.reasons, strict=True))
        ]
        return self._frame(self.whole, choices) | {"usage": self.usage()}

    def chunks_of(self, piece: Piece) -> list[Json]:
        """What a stream says of a piece; a token whose text is not certain yet says nothing, unless for its number."""
        sampled = [piece.sampled] if piece.sampled is not None and self.logprobs else []
        found = []
        if piece.text or sampled:
            found.append(self._chunk(piece.choice, self._delta(piece.text), sampled, None))
        if piece.reason is not None:
            found.append(self._chunk(piece.choice, self._delta(None), [], piece.reason))
        return found

    def opening(self) -> list[Json]:
        """What a stream begins with."""
        return []

    def closing(self) -> Json:
        """The chunk with the number of tokens."""
        return self._frame(self.chunk, []) | {"usage": self.usage()}

    def usage(self) -> Json:
        """Tokens of the prompts and of what was written so far, end tokens included."""
        written = sum(map(len, self.sampled))
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}

    def _chunk(self, choice: int, delta: Json, sampled: Sequence[SampledToken], reason: str | None) -> Json:
        logprobs = self._logprobs(sampled) if sampled else None
        return self._frame(self.chunk, [{"index": choice, **delta, "logprobs": logprobs, "finish_reason": reason}])

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.policy.name,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _token(self, token: int) -> str:
        return self.policy.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @abstractmethod
    def _content(self, text: str) -> Json: ...

    @abstractmethod
    def _delta(self, text: str | None) -> Json: ...

    @abstractmethod
    def _logprobs(self, sampled: Sequence[SampledToken]) -> Json: ...


class ChatAnswer(Answer):
    """Answer of `/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """Who speaks."""
        return [
            self._chunk(number, {"delta": {"role": "assistant", "content": ""}}, [], None)
            for number in range(len(self.texts))
        ]

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str | None) -> Json:
        return {"delta": {} if text is None else {"content": text}}

    def _logprobs(self, sampled: Sequence[SampledToken]) -> Json:
        content = [
            {
                **self._named(one.token, one.logprob),
                "top_logprobs": [self._named(token, logprob) for token, logprob in one.alternatives],
            }
            for one in sampled
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> Json:
        """`bytes` is null for a token that is a part of a character."""
        text = self._token(token)
        return {"token": text, "logprob": logprob, "bytes": None if HALF in text else list(text.encode())}


class CompletionAnswer(Answer):
    """Answer of `/v1/completions`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str | None) -> Json:
        return {"text": text or ""}

    def _logprobs(self, sampled: Sequence[SampledToken]) -> Json:
        """`text_offset` is where a token begins in the text of the tokens given here."""
        tokens = [self._token(one.token) for one in sampled]
        offsets = [len("".join(tokens[:number])) for number in range(len(tokens))]
        named = [{self._token(token): logprob for token, logprob in one.alternatives} for one in sampled]
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in sampled],
            "top_logprobs": named,
            "text_offset": offsets,
        }
