"""Errors as OpenAI's interface has them: a status, and a body with message, type, param and code."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

INVALID, LIMITED, SERVER = "invalid_request_error", "rate_limit_error", "server_error"


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong and how to cure it.
        type_: `invalid_request_error`, `rate_limit_error` or `server_error`.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type_, self.param, self.code = status, message, type_, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": self.message, "type": self.type_, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def too_many(message: str, wait_s: float, code: str = "rate_limit_exceeded") -> ApiError:
    """429, with the seconds after which it is worth asking again."""
    seconds = max(1, round(wait_s + 0.5))
    return ApiError(429, message, type_=LIMITED, code=code, headers={"Retry-After": str(seconds)})


def too_long(tokens: int, places: int, param: str) -> ApiError:
    """400: more tokens than the model reads or the server allows."""
    message = f"This model's maximum context length is {places} tokens, and this request needs {tokens}. Fix: less text"
    return ApiError(400, f"{message}, or a smaller max_tokens", param=param, code="context_length_exceeded")


def unavailable(message: str) -> ApiError:
    """503: the server is going down."""
    return ApiError(503, message, type_=SERVER, code="unavailable", headers={"Retry-After": "5"})


def invalid(error: ValidationError) -> ApiError:
    """400 for the first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"you must provide a {param} parameter", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def _is_branch(part: int | str) -> bool:
    """Whether a place in an error is the name of a type among several, and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))
