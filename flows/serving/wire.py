"""What may be asked: the bodies of requests, checked. What is known and not done is refused by name, never ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flows.serving.errors import ApiError, invalid
from rlhf_core.rollout.token_draw import CutOff

MOST_ALTERNATIVES = 20
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Settings of OpenAI's interface that are not done here, with the values at which they do nothing."""

Text = Annotated[str, Field(max_length=2**20)]
Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(BaseModel):
    """What every request for text may say.

    Attributes:
        top_k: not of OpenAI's; of vLLM's and others' `extra_body`.
        user, metadata: taken and not looked at: they change no answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    n: Annotated[int | None, Field(ge=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_done_here(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("the body must be an object")
        for name, neutral in NEUTRAL.items():
            if name in given and given[name] is not None and given[name] not in neutral:
                raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
        return {name: value for name, value in given.items() if name not in NEUTRAL}

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop is not None and not all([stop] if isinstance(stop, str) else stop):
            raise ValueError("a stop text is empty")
        return stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def cut_off(self) -> CutOff:
        """Which tokens may be drawn."""
        top_p = 1.0 if self.top_p is None else self.top_p
        return CutOff(top_k=self.top_k if self.top_k and self.top_k > 0 else None, top_p=top_p)

    @property
    def with_usage(self) -> bool:
        """Whether a stream says at its end how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn; `developer` is OpenAI's newer word for `system`, a `name` is taken and not looked at."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None
    refusal: None = None

    @property
    def turn(self) -> dict[str, str]:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_ALTERNATIVES)] = None

    @model_validator(mode="after")
    def _alternatives_of_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        return self


class CompletionAsked(Asked):
    """Body of `/v1/completions`: text, or tokens, to be gone on with as they stand."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_ALTERNATIVES)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class ScoreAsked(BaseModel):
    """Body of `/score`: a prompt as the data files have it, or messages, and one response or several to it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage] | None, Field(min_length=1)] = None
    response: Text | list[Text]

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give prompt or messages, one of them", param="prompt", code="invalid_value")
        return self

    @property
    def responses(self) -> list[str]:
        """One or several."""
        return [self.response] if isinstance(self.response, str) else self.response


def parse(kind: type[Body], body: bytes) -> Body:
    """A body as what it should be.

    Raises:
        ApiError: it is no JSON, or says something that is not understood or not done here.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
