"""What makes two prompts the same one, and which prompts a split keeps together; every identity made of texts.

`prompt_identity` and `prompt_group` are taken from the turns of the prompt, of which only what can be seen counts
(`rlhf_core.text.normal.visible`). So a prompt has the same identity as text, as a transcript, as messages, with other
white space, in another Unicode form, in other case, and with characters in it that nobody sees. A plain prompt is a
dialogue of one turn.
"""

import hashlib
import json
from functools import lru_cache
from typing import NamedTuple

from rlhf_core.text.likeness import num_words
from rlhf_core.text.normal import normal_form, without_hidden
from rlhf_core.text.tool_turns import read_reply, said_by_calls
from rlhf_core.text.transcripts import conversation

QUESTION_WORDS = 4
"""A later turn of so many words means something by itself; `Thank you.` or `Tell me more.` does not."""

_SPEAKER = {"system": "", "user": "human: ", "assistant": "assistant: ", "tool": "tool: ", "tools": "tools: "}
_INSTRUCTING = ("system", "tools")


class Turn(NamedTuple):
    """Who speaks (system, user, assistant or tool), and what can be seen of it, in normal form. The tools that may be
    called are the first turn of `tools`; a call is among what the assistant says, without its id."""

    role: str
    content: str


@lru_cache(maxsize=256)
def seen_turns(prompt: str) -> tuple[Turn, ...]:
    """The turns of a prompt; those of which nothing can be seen are left out."""
    turns, tools = conversation(without_hidden(prompt).replace("\r\n", "\n").replace("\r", "\n"))
    said = [(turn["role"], f"{turn['content']} {said_by_calls(turn)}") for turn in turns]
    given = [("tools", json.dumps(tools, ensure_ascii=False, sort_keys=True))] if tools else []
    seen = (Turn(role, normal_form(text)) for role, text in [*given, *said])
    return tuple(turn for turn in seen if turn.content)


def seen_reply(text: str) -> str:
    """A response as likeness is judged by: one that calls tools without the ids of its calls, any other as it is."""
    turn = read_reply(text)
    return text if turn is None else f"{turn['content']} {said_by_calls(turn)}"


def content_id(*parts: str) -> str:
    """An identity made of texts, letter for letter: the first 16 hex digits of the SHA-256 of all, with NUL between."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def prompt_id(prompt: str) -> str:
    """The column `prompt_id`, by which tables are joined: it names a text, and says nothing of its other forms."""
    return content_id(prompt)


def prompt_identity(prompt: str) -> str:
    """Identity of all prompts with the same turns, 16 hex digits: whether two texts are the same prompt."""
    return content_id(_text(seen_turns(prompt)))


def prompt_group(prompt: str) -> str:
    """Identity of all prompts that begin with the same turn of the user, that is of a dialogue: 16 hex digits.

    A split holds out groups, as what is said later in a dialogue tells what was said before. The system's turn does not
    count: a question is the same question under other instructions.
    """
    return content_id(opening(prompt))


def opening(prompt: str) -> str:
    """The first turn of the user in normal form; where there is none, all turns."""
    turns = seen_turns(prompt)
    return next((turn.content for turn in turns if turn.role == "user"), _text(turns))


def later_questions(prompt: str) -> list[str]:
    """The user's turns after the first, in normal form, that are at least four words long."""
    asked = [turn.content for turn in seen_turns(prompt) if turn.role == "user"]
    return [content for content in asked[1:] if num_words(content) >= QUESTION_WORDS]


def later_groups(prompt: str) -> set[str]:
    """The groups of the prompts that ask at first what this one asks later."""
    return {content_id(question) for question in later_questions(prompt)}


def last_group(prompt: str) -> str | None:
    """The group of the prompts that ask at first what this one asks last; null where it asks once or too shortly."""
    asked = [turn.content for turn in seen_turns(prompt) if turn.role == "user"]
    return content_id(asked[-1]) if len(asked) > 1 and num_words(asked[-1]) >= QUESTION_WORDS else None


def instructions(prompt: str) -> str:
    """What the system says, and which tools may be called, in normal form."""
    return " ".join(turn.content for turn in seen_turns(prompt) if turn.role in _INSTRUCTING)


def said(prompt: str) -> str:
    """What the user, the assistant and tools say, in normal form."""
    return _text(spoken_turns(prompt))


def spoken_turns(prompt: str) -> tuple[Turn, ...]:
    """The turns without those of the system, and without the tools that may be called."""
    return tuple(turn for turn in seen_turns(prompt) if turn.role not in _INSTRUCTING)


def _text(turns: tuple[Turn, ...]) -> str:
    if [turn.role for turn in turns] == ["user"]:
        return turns[0].content
    spoken = [_SPEAKER[turn.role] + turn.content for turn in turns]
    return " ".join([*spoken, "assistant:"]) if spoken else ""
