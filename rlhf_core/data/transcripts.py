"""Dialogues as text: the `Human:`/`Assistant:` form of hh-rlhf, and lists of messages rendered into it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKER = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT}


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """What was said before the last reply (up to and including its `Assistant:`), and that reply, stripped."""

    prompt: str
    response: str

    @property
    def alternates(self) -> bool:
        """Whether the human speaks first and nobody speaks twice in a row."""
        speakers = _TURN.findall(self.prompt)
        return speakers[:1] == ["Human"] and all(first != second for first, second in pairwise(speakers))


def is_transcript(text: str) -> bool:
    """Whether the text is a dialogue that begins with a turn of the human or the assistant."""
    return text.startswith((HUMAN, ASSISTANT)) and ASSISTANT in text


def parse_transcript(text: str) -> Dialogue:
    """Cut a transcript before its last reply.

    Raises:
        ValueError: the last turn is not the assistant's.
    """
    cut = text.rfind(ASSISTANT)
    if cut < 0 or cut < text.rfind(HUMAN):
        raise ValueError("the last turn is not the assistant's")
    end = cut + len(ASSISTANT)
    return Dialogue(prompt=text[:end], response=text[end:].strip())


def parse_messages(messages: Sequence[Any]) -> Dialogue:
    """Render `[{"role": "system" | "user" | "assistant", "content": text}, ...]` as a dialogue.

    A system message may only come first; its text stands before the first turn. Role `human` is read as `user`.

    Raises:
        ValueError: a message of another form, an unknown role, no or an empty turn before the reply, or a last
            message that is not the assistant's.
    """
    parts: list[str] = []
    role = ""
    for number, message in enumerate(messages, start=1):
        role, content = _role_and_content(message, number)
        if role == "system":
            if number > 1:
                raise ValueError(f"message {number} has role 'system', which only the first may have")
            parts.append(content.strip())
        elif role not in _SPEAKER:
            raise ValueError(f"message {number} has role {role!r}; known are system, user, assistant")
        elif number < len(messages):
            if not content.strip():
                raise ValueError(f"message {number} is empty")
            parts.append(f"{_SPEAKER[role]} {content.strip()}")
    if role != "assistant" or len(parts) == 0:
        raise ValueError("the last of at least two messages must be the assistant's")
    return Dialogue(prompt="".join(parts) + ASSISTANT, response=content.strip())


def _role_and_content(message: Any, number: int) -> tuple[str, str]:
    match message:
        case {"role": str(role), "content": str(content)}:
            return role, content
    raise ValueError(f"message {number} is not an object with text `role` and `content`")
