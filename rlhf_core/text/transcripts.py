"""Dialogues as text: the `Human:`/`Assistant:` form of hh-rlhf, lists of messages rendered into it, and read back.

A prompt is text in every table, whatever it came from, so that equal prompts are equal texts. One that ends with
`Assistant:` after a turn of the human is a dialogue, and `prompt_turns` has its turns again. One with tools is a
dialogue too, as JSON (`rlhf_core.text.tool_turns`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf_core.text.tool_turns import (
    Conversation,
    Message,
    ToolFault,
    Tools,
    check_results,
    read_calls,
    read_dialogue,
    uses_tools,
    write_dialogue,
    write_reply,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_USER = ("user", "human")
_SYSTEM = ("system", "developer")
_SPEAKER = {"user": HUMAN, "assistant": ASSISTANT}
_ROLE = {"Human": "user", "Assistant": "assistant"}

_UNREAD_CALLS = ("function_call", "audio")
_READ = frozenset({"role", "content", "weight", "tool_calls", *_UNREAD_CALLS})
_READ_OF_RESULT = frozenset({"name", "tool_call_id"})
_NOTHING: tuple[Any, ...] = (None, "", [], {})


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
    return list(conversation(prompt).turns)


def conversation(prompt: str) -> Conversation:
    """The turns of a prompt with the tools that may be called."""
    return read_dialogue(prompt) or Conversation(_transcript_turns(prompt), [])


def with_tools(prompt: str, tools: Tools) -> str:
    """A prompt in which these tools may be called; without any it stays as it is."""
    return write_dialogue(prompt_turns(prompt), tools) if tools else prompt


def _transcript_turns(prompt: str) -> list[Message]:
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
    if (dialogue := read_dialogue(prompt)) is not None:
        turns, tools = dialogue
        places = [place for place, turn in enumerate(turns) if place and turn["role"] == "assistant"]
        earlier = [(write_dialogue(turns[:place], tools), write_reply(turns[place])) for place in places]
        return [*((before, reply) for before, reply in earlier if reply), (prompt, response)]
    spoken = [(prompt[:start], prompt[start:end].strip()) for start, end in earlier_replies(prompt)]
    return [*((before, reply) for before, reply in spoken if reply), (prompt, response)]


def alternates(prompt: str) -> bool:
    """Whether the human speaks first and nobody speaks twice in a row; true where there are no turns. Tools may: one
    turn of the assistant can call several."""
    if (dialogue := read_dialogue(prompt)) is not None:
        roles = [turn["role"] for turn in dialogue.turns if turn["role"] != "system"]
        return roles[:1] == ["user"] and all(one != next_ or one == "tool" for one, next_ in pairwise(roles))
    speakers = _TURN.findall(prompt)
    return not speakers or (speakers[0] == "Human" and all(first != second for first, second in pairwise(speakers)))


def parse_messages(messages: Sequence[Any], tools: Tools | None = None) -> Dialogue:
    """Render `[{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...]` as a dialogue.

    System messages may only come first; their text stands before the first turn. Role `human` is read as `user`,
    `developer` as `system`. A content may be a list of parts `{"type": "text", "text": ...}`. A dialogue in which tools
    are called, or may be, becomes one with tools.

    Raises:
        ToolFault: a call or an answer of a tool is malformed.
        ValueError: a message of another form, one with a weight, an unknown role, a part that is no text, no or an
            empty turn before the reply, one whose text would be read back as more than one turn, or a last message that
            is not the assistant's.
    """
    turns = _read(messages)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError("the last of at least two messages must be the assistant's")
    return Dialogue(prompt=_render(turns[:-1], tools or []), response=write_reply(turns[-1]))


def render_turns(messages: Sequence[Any], tools: Tools | None = None) -> str:
    """Render the messages of a prompt, after which the assistant is to speak, as a dialogue; see `parse_messages`.

    Raises:
        ToolFault, ValueError: as `parse_messages`, and a last message that is neither the user's nor a tool's.
    """
    turns = _read(messages)
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise ValueError("the last message of a prompt must be the user's, or what a tool answered")
    return _render(turns, tools or [])


def _read(messages: Sequence[Any]) -> list[Message]:
    """The messages as turns of known roles, those of the system first and as one."""
    turns = [_read_message(message, number) for number, message in enumerate(messages, start=1)]
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "system" and any(earlier["role"] != "system" for earlier in turns[:number]):
            raise ValueError(
                f"message {number} has role {messages[number - 1]['role']!r}, which only the first may have"
            )
    check_results(turns)
    return turns


def _render(turns: Sequence[Message], tools: Tools) -> str:
    before = "\n\n".join(filter(None, (turn["content"].strip() for turn in turns if turn["role"] == "system")))
    if uses_tools(turns, tools):
        system = [{"role": "system", "content": before}] if before else []
        return write_dialogue([*system, *_spoken(turns)], tools)
    text = before
    for number, turn in enumerate(turns, start=1):
        if forged := _TURN.search(turn["content"]):
            raise ValueError(f"message {number} has a line that begins a turn of its own, {forged[0].strip()!r}")
        if turn["role"] in _SPEAKER:
            if not turn["content"].strip():
                raise ValueError(f"message {number} is empty")
            text += f"{_SPEAKER[turn['role']]} {turn['content'].strip()}"
    return text + ASSISTANT


def _spoken(turns: Sequence[Message]) -> list[Message]:
    """The turns but for the system's, contents stripped; who says nothing must call a tool, or be one."""
    spoken = []
    for number, turn in enumerate(turns, start=1):
        content = turn["content"].strip()
        if turn["role"] in _SPEAKER and not content and not turn.get("tool_calls"):
            raise ValueError(f"message {number} is empty")
        if turn["role"] != "system":
            spoken.append(turn | {"content": content})
    return spoken


def message_notes(messages: Sequence[Any]) -> frozenset[str]:
    """What messages hold besides who says what, where something is there: `reasoning_content`, `name`, `id`."""
    found: set[str] = set()
    for message in messages:
        if isinstance(message, dict):
            read = _READ | _READ_OF_RESULT if message.get("role") == "tool" else _READ
            found |= {str(key) for key, value in message.items() if key not in read and value not in _NOTHING}
    return frozenset(found)


def _read_message(message: Any, number: int) -> Message:
    """A message as a turn: its role under its one name, its content as text, its calls in one form."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} is not an object with text `role` and `content`")
    role = _role(message["role"], number)
    if unread := next((key for key in _UNREAD_CALLS if message.get(key) not in _NOTHING), None):
        raise ValueError(f"message {number} has {unread}; only text and tool_calls are read")
    if message.get("weight", 1) not in (None, 1):
        raise ValueError(
            f"message {number} has weight {str(message['weight'])[:40]}; turns have no weights. "
            "Leave it out, or set sft.turns: last"
        )
    calls = [] if message.get("tool_calls") in _NOTHING else read_calls(message["tool_calls"], number)
    if calls and role != "assistant":
        raise ToolFault(f"message {number} has tool_calls, and role {role!r}: only the assistant calls tools")
    turn: Message = {"role": role, "content": _content(message, number, may_lack=bool(calls))}
    if calls:
        turn["tool_calls"] = calls
    if role == "tool":
        turn |= {key: message[key] for key in sorted(_READ_OF_RESULT) if isinstance(message.get(key), str)}
    return turn


def _role(role: str, number: int) -> str:
    if role in _SYSTEM:
        return "system"
    if role in _USER:
        return "user"
    if role not in ("assistant", "tool"):
        raise ValueError(f"message {number} has role {role!r}; known are system, developer, user, assistant, tool")
    return role


def _content(message: dict[str, Any], number: int, *, may_lack: bool) -> str:
    match message.get("content"):
        case str(content):
            return content
        case list(parts):
            return "".join(_text_of_part(part, number) for part in parts)
        case None if may_lack:
            return ""
    raise ValueError(f"message {number} is not an object with text `role` and `content`")


def _text_of_part(part: Any, number: int) -> str:
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"message {number} has a part of type {str(kind)[:40]!r}; only text is read")
