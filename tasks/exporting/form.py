"""What a writer of a format is given, and what it says of what it wrote."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.exporting.subject import Numbers, Subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a writer of a format is given.

    Attributes:
        subject: the version.
        model, tokenizer: of it, loaded; the writer leaves them as they are unless it says so.
        numbers: float32 or float16.
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
