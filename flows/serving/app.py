"""The routes of the server."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from flows.serving.errors import SERVER, ApiError, too_long, too_many
from flows.serving.gate import Gate, body_within
from flows.serving.limits import Limits, RateLimiter
from flows.serving.wire import ChatAsked, CompletionAsked, ScoreAsked, parse
from flows.serving.writing import as_api_error, chat_answer, completion_answer, send
from rlhf_core.errors import DataError
from rlhf_core.serving.scoring import ToScore
from rlhf_core.serving.served import Served, ServedPolicy, ServedScorer

LOG = logging.getLogger("rlhf.serving")


def make_app(models: Mapping[str, Served], limits: Limits, keys: Sequence[str] = ()) -> FastAPI:
    """An application that serves models under their names; a model may have several names."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    started = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(model, started) for model in dict.fromkeys(models.values())]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        return _described(_find(models, name), started)

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        asked = parse(ChatAsked, await body_within(http.stream(), limits.body_bytes))
        policy = _writer(models, asked.model)
        return await send(http, policy, asked, *chat_answer(policy, asked, limits))

    @app.post("/v1/completions")
    async def complete(http: Request) -> Response:
        asked = parse(CompletionAsked, await body_within(http.stream(), limits.body_bytes))
        policy = _writer(models, asked.model)
        return await send(http, policy, asked, *completion_answer(policy, asked, limits))

    @app.post("/score")
    @app.post("/v1/score")
    async def score(http: Request) -> dict[str, Any]:
        asked = parse(ScoreAsked, await body_within(http.stream(), limits.body_bytes))
        return await _scored(_scorer(models, asked.model), asked, limits)

    _answer_errors_in_their_form(app)
    app.add_middleware(Gate, keys=keys, limiter=RateLimiter(limits.per_minute), body_bytes=limits.body_bytes)
    return app


def _answer_errors_in_their_form(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def by_status(http: Request, error: HTTPException) -> JSONResponse:
        what = {404: "Unknown request URL", 405: "Method not allowed"}.get(error.status_code, str(error.detail))
        message = f"{what}: {http.method} {http.url.path}"
        return ApiError(error.status_code, message, code="unknown_url", headers=error.headers).response()

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        LOG.error("a request failed", exc_info=error)
        return ApiError(500, "The server had an error of its own.", type_=SERVER, code="internal_error").response()


def _described(model: Served, created: int) -> dict[str, Any]:
    kind = "scorer" if isinstance(model, ServedScorer) else "policy"
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "rlhf",
        "kind": kind,
        "max_model_len": model.places,
    }


def _find(models: Mapping[str, Served], name: str) -> Served:
    if name not in models:
        known = ", ".join(dict.fromkeys(model.name for model in models.values()))
        message = f"The model {name!r} does not exist here. Fix: one of {known}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return models[name]


def _writer(models: Mapping[str, Served], name: str) -> ServedPolicy:
    found = _find(models, name)
    if isinstance(found, ServedPolicy):
        return found
    raise ApiError(400, f"{name} scores responses and writes none. Fix: POST /score", param="model", code="wrong_kind")


def _scorer(models: Mapping[str, Served], name: str) -> ServedScorer:
    found = _find(models, name)
    if isinstance(found, ServedScorer):
        return found
    message = f"{name} writes responses and scores none. Fix: POST /v1/chat/completions, or serve a reward model"
    raise ApiError(400, message, param="model", code="wrong_kind")


async def _scored(scorer: ServedScorer, asked: ScoreAsked, limits: Limits) -> dict[str, Any]:
    rows = _to_score(scorer, asked)
    if len(rows) > limits.choices:
        message = f"response: {len(rows)} of them, and this server scores at most {limits.choices} a request"
        raise ApiError(400, message, param="response", code="invalid_value")
    if scorer.thread.waiting >= limits.waiting:
        raise too_many("The server is busy: too many requests wait for their turn", 1.0, "server_busy")
    try:
        scores = await asyncio.wrap_future(scorer.thread.submit(rows))
    except Exception as error:
        LOG.error("scoring failed", exc_info=error)
        raise as_api_error(error) from error
    read = sum(len(row.prompt) + len(row.response) for row in rows)
    return {
        "object": "list",
        "model": scorer.name,
        "data": [{"object": "score", "index": number, "score": score} for number, score in enumerate(scores)],
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }


def _to_score(scorer: ServedScorer, asked: ScoreAsked) -> list[ToScore]:
    """Tokens of what is to be scored.

    Raises:
        ApiError: 400, a text that template or tokenizer refuse, or too long a row.
    """
    param = "prompt" if asked.messages is None else "messages"
    try:
        if asked.messages is None:
            prompt = scorer.texts.of_prompt(asked.prompt or "")
        else:
            prompt = scorer.texts.of_messages([message.turn for message in asked.messages])
        param = "response"
        rows = [ToScore(prompt, scorer.texts.of_response(response)) for response in asked.responses]
    except DataError as error:
        raise ApiError(400, str(error), param=param, code="invalid_value") from None
    longest = max((len(row.prompt) + len(row.response) for row in rows), default=0)
    if longest > scorer.places:
        raise too_long(longest, scorer.places, "response")
    return rows
