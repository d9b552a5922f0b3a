"""Dialogues as text: the `Human:`/`Assistant:` form of hh-rlhf, lists of messages rendered into it, and read back.

A prompt is text in every table, whatever it came from, so that equal prompts are equal texts. One that ends with
`Assistant:` after a turn of the human is a dialogue, and `prompt_turns` has its turns again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_USER = ("user", "human")
_SYSTEM = ("system", "developer")
_SPEAKER = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT}
_ROLE = {"Human": "user", "Assistant": "assistant"}

_CALLS = ("tool_calls", "function_call", "audio")
_READ = frozenset({"role", "content", "weight", *_CALLS})
_NOTHING: tuple[Any, ...] = (None, "", [], {})

Message = dict[str, str]
"""A turn: `role` (system, user or assistant) and `content`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """What was said before the last reply (up to and including its `Assistant:`), and that reply, stripped."""

    prompt: str
    response: str


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


def is_dialogue(prompt: str) -> bool:
    """Whether a prompt is a dialogue in which the assistant is to speak next."""
    return prompt.endswith(ASSISTANT) and HUMAN in prompt


def prompt_turns(prompt: str) -> list[Message]:
    """The turns of a prompt, contents stripped: those of a dialogue, with what stands before it as the system's turn,
    else one turn of the user. White space that a dialogue lost or got at its ends makes no other of it."""
    text = prompt.rstrip()
    text = f"\n\n{text.lstrip()}" if text.lstrip().startswith(HUMAN.strip()) else text
    if not is_dialogue(text):
        return [{"role": "user", "content": prompt.strip()}]
    before, *rest = _TURN.split(text[: -len(ASSISTANT)])
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    spoken = zip(rest[::2], rest[1::2], strict=True)
    return turns + [{"role": _ROLE[speaker], "content": content.strip()} for speaker, content in spoken]


def earlier_replies(prompt: str) -> list[tuple[int, int]]:
    """Where the assistant's turns of a dialogue stand in its text: begin (after `Assistant:`) and end of each."""
    if not is_dialogue(prompt):
        return []
    turns = pairwise(_TURN.finditer(prompt))
    return [(turn.end(), following.start()) for turn, following in turns if turn[1] == "Assistant"]


def replies_of(prompt: str, response: str) -> list[tuple[str, str]]:
    """Every turn of the assistant with the prompt it answers, the response last; replies without text are left out."""
    spoken = [(prompt[:start], prompt[start:end].strip()) for start, end in earlier_replies(prompt)]
    return [*((before, reply) for before, reply in spoken if reply), (prompt, response)]


def alternates(prompt: str) -> bool:
    """Whether the human speaks first and nobody speaks twice in a row; true where there are no turns."""
    speakers = _TURN.findall(prompt)
    return not speakers or (speakers[0] == "Human" and all(first != second for first, second in pairwise(speakers)))


def parse_messages(messages: Sequence[Any]) -> Dialogue:
    """Render `[{"role": "system" | "user" | "assistant", "content": text}, ...]` as a dialogue.

    System messages may only come first; their text stands before the first turn. Role `human` is read as `user`,
    `developer` as `system`. A content may be a list of parts `{"type": "text", "text": ...}`.

    Raises:
        ValueError: a message of another form, one with a tool's call or a weight, an unknown role, a part that is no
            text, no or an empty turn before the reply, one whose text would be read back as more than one turn, or a
            last message that is not the assistant's.
    """
    turns = _read(messages)
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise ValueError("the last of at least two messages must be the assistant's")
    return Dialogue(prompt=_render(turns[:-1]), response=turns[-1][1].strip())


def render_turns(messages: Sequence[Any]) -> str:
    """Render the messages of a prompt, after which the assistant is to speak, as a dialogue; see `parse_messages`.

    Raises:
        ValueError: as `parse_messages`, and a last message that is not the user's.
    """
    turns = _read(messages)
    if not turns or turns[-1][0] not in _USER:
        raise ValueError("the last message of a prompt must be the user's")
    return _render(turns)


def _read(messages: Sequence[Any]) -> list[tuple[str, str]]:
    """Role and content of each message, all roles being known and those of the system's turn first."""
    turns = [_role_and_content(message, number) for number, message in enumerate(messages, start=1)]
    for number, (role, _) in enumerate(turns, start=1):
        if role in _SYSTEM and any(earlier not in _SYSTEM for earlier, _ in turns[:number]):
            raise ValueError(f"message {number} has role {role!r}, which only the first may have")
        if role not in _SYSTEM and role not in _SPEAKER:
            raise ValueError(f"message {number} has role {role!r}; known are system, developer, user, assistant")
    return turns


def _render(turns: Sequence[tuple[str, str]]) -> str:
    before = [content.strip() for role, content in turns if role in _SYSTEM]
    text = "\n\n".join(filter(None, before))
    for number, (role, content) in enumerate(turns, start=1):
        if forged := _TURN.search(content):
            raise ValueError(f"message {number} has a line that begins a turn of its own, {forged[0].strip()!r}")
        if role in _SPEAKER:
            if not content.strip():
                raise ValueError(f"message {number} is empty")
            text += f"{_SPEAKER[role]} {content.strip()}"
    return text + ASSISTANT


def message_notes(messages: Sequence[Any]) -> frozenset[str]:
    """What messages hold besides who says what, where something is there: `reasoning_content`, `name`, `id`."""
    notes = (item for message in messages if isinstance(message, dict) for item in message.items())
    return frozenset(str(key) for key, value in notes if key not in _READ and value not in _NOTHING)


def _role_and_content(message: Any, number: int) -> tuple[str, str]:
    if isinstance(message, dict):
        if call := next((key for key in _CALLS if message.get(key) not in _NOTHING), None):
            raise ValueError(f"message {number} has {call}; only text is read")
        if message.get("weight", 1) not in (None, 1):
            raise ValueError(
                f"message {number} has weight {str(message['weight'])[:40]}; turns have no weights. "
                "Leave it out, or set sft.turns: last"
            )
    match message:
        case {"role": str(role), "content": str(content)}:
            return role, content
        case {"role": str(role), "content": list(parts)}:
            return role, "".join(_text_of_part(part, number) for part in parts)
    raise ValueError(f"message {number} is not an object with text `role` and `content`")


def _text_of_part(part: Any, number: int) -> str:
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"message {number} has a part of type {str(kind)[:40]!r}; only text is read")
