"""From a request for text to its answer: what is wanted, and how it is sent."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from flows.serving.answers import Answer, ChatAnswer, CompletionAnswer, Json
from flows.serving.errors import SERVER, ApiError, too_long, too_many, unavailable
from flows.serving.generation import Generation, Piece, Wanted
from flows.serving.limits import Limits
from flows.serving.wire import Asked, ChatAsked, CompletionAsked
from rlhf_core.errors import DataError, EnvironmentProblem, RlhfError
from rlhf_core.serving.continuous import Request
from rlhf_core.serving.served import ServedPolicy
from rlhf_core.serving.text_stream import TextStream, plain_decoder, reply_stream

SILENCE_S = 15.0
"""A stream that has nothing to say for so long says a comment, so that nothing between takes it for dead."""

COMPLETION_TOKENS = 16
"""What `/v1/completions` writes where nothing else is asked for, as OpenAI's does."""


def chat_answer(policy: ServedPolicy, asked: ChatAsked, limits: Limits) -> tuple[Answer, list[Wanted]]:
    """What a chat wants.

    Raises:
        ApiError: 400, the messages cannot be answered or are too long, or too much is asked for.
    """
    try:
        prompt = policy.texts.of_messages([message.turn for message in asked.messages])
    except DataError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    room = room_for(policy, prompt, "messages")
    longest = response_room(asked, asked.max_completion_tokens or asked.max_tokens, room, limits)
    wanted = _wanted(
        policy,
        asked,
        limits,
        [prompt],
        longest,
        asked.top_logprobs or 0,
        lambda: reply_stream(policy.tokenizer, asked.stops),
    )
    return ChatAnswer(policy, len(prompt), len(wanted), logprobs=bool(asked.logprobs)), wanted


def completion_answer(policy: ServedPolicy, asked: CompletionAsked, limits: Limits) -> tuple[Answer, list[Wanted]]:
    """What a completion wants.

    Raises:
        ApiError: see `chat_answer`.
    """
    prompts = [_tokens(policy, prompt) for prompt in asked.prompts]
    if not prompts:
        raise ApiError(400, "prompt: there is none", param="prompt", code="invalid_value")
    room = min(room_for(policy, prompt, "prompt") for prompt in prompts)
    longest = response_room(asked, asked.max_tokens or min(COMPLETION_TOKENS, room), room, limits)
    decode = plain_decoder(policy.tokenizer)
    wanted = _wanted(
        policy, asked, limits, prompts, longest, asked.logprobs or 0, lambda: TextStream(decode, asked.stops)
    )
    prompt_tokens = sum(map(len, prompts))
    return CompletionAnswer(policy, prompt_tokens, len(wanted), logprobs=asked.logprobs is not None), wanted


def room_for(policy: ServedPolicy, prompt: Sequence[int], param: str) -> int:
    """Tokens that a prompt leaves for its response.

    Raises:
        ApiError: none.
    """
    if len(prompt) >= policy.places:
        raise too_long(len(prompt) + 1, policy.places, param)
    return policy.places - len(prompt)


def response_room(asked: Asked, tokens: int | None, room: int, limits: Limits) -> int:
    """The longest response: what is asked for, or what there is room for.

    Raises:
        ApiError: more than the model has room for, or the server allows.
    """
    if tokens is None:
        return min(room, limits.response_tokens)
    param = "max_completion_tokens" if "max_completion_tokens" in asked.model_fields_set else "max_tokens"
    if tokens > limits.response_tokens:
        message = f"{param} is {tokens}, and this server writes at most {limits.response_tokens} tokens a response"
        raise ApiError(400, message, param=param, code="invalid_value")
    if tokens > room:
        message = f"{param} is {tokens}, and the prompt leaves room for {room} tokens"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return tokens


def _tokens(policy: ServedPolicy, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, list):
        if not prompt or not all(0 <= token < policy.vocabulary for token in prompt):
            message = f"prompt: tokens are numbers from 0 to {policy.vocabulary - 1}, at least one"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return prompt
    try:
        return policy.texts.of_text(prompt)
    except DataError:
        raise ApiError(400, "prompt: it is empty", param="prompt", code="invalid_value") from None


def _wanted(
    policy: ServedPolicy,
    asked: Asked,
    limits: Limits,
    prompts: Sequence[list[int]],
    longest: int,
    alternatives: int,
    stream: Callable[[], TextStream],
) -> list[Wanted]:
    """`n` responses to each prompt; without a seed nobody can tell which they will be."""
    count = (asked.n or 1) * len(prompts)
    if count > limits.choices:
        raise ApiError(
            400, f"n: {count} responses, and this server writes at most {limits.choices} a request", param="n",
            code="invalid_value",
        )  # fmt: skip
    if len(asked.stops) > limits.stop_texts:
        raise ApiError(400, f"stop: at most {limits.stop_texts} texts", param="stop", code="invalid_value")
    if policy.thread.load[1] + count > limits.waiting:
        raise too_many("The server is busy: too many responses wait for their turn", 1.0, "server_busy")
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    return [
        Wanted(
            request=Request(
                prompt=prompt,
                max_new_tokens=longest,
                eos_ids=policy.eos_ids,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                cut_off=asked.cut_off,
                seed=seed,
                number=number,
                alternatives=alternatives,
            ),
            stream=stream(),
        )
        for prompt in prompts
        for number in range(asked.n or 1)
    ]


async def send(
    http: HttpRequest, policy: ServedPolicy, asked: Asked, answer: Answer, wanted: Sequence[Wanted]
) -> Response:
    """Have it written and send it, whole or as it grows; whoever hangs up frees the rows.

    Raises:
        ApiError: it failed before anything was sent.
    """
    try:
        generation = Generation(policy, wanted)
    except EnvironmentProblem as error:
        raise unavailable(str(error)) from None
    if asked.stream:
        pieces = _events(generation, answer, with_usage=asked.with_usage)
        return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    writing = asyncio.ensure_future(_collect(generation, answer))
    leaving = asyncio.ensure_future(_hung_up(http))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(writing.result()) if writing.done() else Response(status_code=499)
    except Exception as error:
        raise as_api_error(error) from error
    finally:
        leaving.cancel()
        writing.cancel()
        generation.cancel()


def as_api_error(error: Exception) -> ApiError:
    """What a failure while writing is for the caller; what is inside stays inside."""
    match error:
        case ApiError():
            return error
        case EnvironmentProblem():
            return unavailable(str(error))
        case RlhfError():
            return ApiError(500, str(error), type_=SERVER, code="generation_failed")
    return ApiError(500, "The server failed to write this response.", type_=SERVER, code="internal_error")


async def _collect(generation: Generation, answer: Answer) -> Json:
    async for piece in generation.pieces():
        answer.take(piece)
    return answer.body()


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(generation: Generation, answer: Answer, *, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; a failure is one too, since the status was sent long ago."""
    more: Json = {"usage": None} if with_usage else {}
    try:
        for chunk in answer.opening():
            yield _event(chunk | more)
        async for piece in _with_comments(generation):
            if piece is None:
                yield b": still at it\n\n"
                continue
            answer.take(piece)
            for chunk in answer.chunks_of(piece):
                yield _event(chunk | more)
        if with_usage:
            yield _event(answer.closing())
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield _event(as_api_error(error).body)
    finally:
        generation.cancel()


async def _with_comments(generation: Generation) -> AsyncIterator[Piece | None]:
    """Pieces, and None where there was none for a while."""
    pieces = generation.pieces()
    upcoming = asyncio.ensure_future(anext(pieces, None))
    try:
        while True:
            done, _ = await asyncio.wait({upcoming}, timeout=SILENCE_S)
            if not done:
                yield None
                continue
            piece = upcoming.result()
            if piece is None:
                return
            yield piece
            upcoming = asyncio.ensure_future(anext(pieces, None))
    finally:
        upcoming.cancel()


def _event(body: Json) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
