"""What a writer of a format is given, and what it says of what it wrote."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.exporting.parity import Parity
from tasks.exporting.prompts import Pair
from tasks.exporting.subject import Numbers, Subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A version to be written and tried.

    Attributes:
        subject: the version.
        numbers: what its weights are written in.
        texts: what it is tried on.
        tell: gets a line before each step that takes its time.
    """

    subject: Subject
    numbers: Numbers
    texts: list[Pair]
    tell: Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A policy as its writer gets it.

    Attributes:
        subject: the version.
        model, tokenizer: of it, loaded; a writer that rounds weights rounds them here too, and so says what is meant.
        numbers: what weights are written in.
    """

    subject: Subject
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    numbers: Numbers = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenForm:
    """What a writer says of what it wrote.

    Attributes:
        named: what the stranger needs to read it, beside the folder.
        limits: what this form loses or cannot, a sentence each, for the card.
        loading: an example for the card, in Markdown.
        said: more for the manifest.
    """

    named: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    loading: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)


class Made(NamedTuple):
    """A form that was written, and how it was found by a stranger."""

    written: WrittenForm
    parity: Parity
