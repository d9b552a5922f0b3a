"""Rows that hold whole dialogues, as transcripts or as messages, become rows with a prompt and responses.

A dialogue may stand in a reply (the prompt and the reply together), or in two parts, as TRL's explicit prompt does: the
turns so far in `prompt`, and what is said after them in the reply. A prompt beside whole dialogues must say the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_core.data.reading.kinds import Kind
from rlhf_core.data.reading.transcript_forms import holds_turns, read_prompt, read_transcript
from rlhf_core.text.identity import prompt_identity, seen_turns, spoken_turns
from rlhf_core.text.normal import normal_form
from rlhf_core.text.tool_turns import Tools, read_tools
from rlhf_core.text.transcripts import (
    Dialogue,
    alternates,
    is_transcript,
    message_notes,
    parse_messages,
    parse_transcript,
    prompt_turns,
    render_turns,
    with_tools,
)

REPLIES: Mapping[Kind, tuple[str, ...]] = {
    "demonstrations": ("response", "completion", "answer"),
    "comparisons": ("chosen", "rejected"),
    "votes": ("response_a", "response_b"),
    "rankings": ("responses",),
    "graded": ("response", "completion", "answer"),
}
"""The fields of a raw row in which a reply may stand."""

TOOLS = "tools"
"""The column that holds the schemas of tools."""

_GOES_ON = ("assistant", "tool")  # who speaks first in a reply that goes on from its prompt
_PROMPT_FIELDS = ("prompt", "question")


@dataclass(kw_only=True, slots=True)
class Unfolded:
    """A row with a prompt and responses.

    Attributes:
        value: the row; all else as it was.
        parts_early: its dialogues differ before their last turn.
        alternates: the speakers of the dialogue take turns; true where there is none.
        reformed: the prompt was a text that is nearly a transcript, and is one now.
        holds_turns: the prompt is read as one turn of the user, and has lines that begin turns.
        notes: what its messages hold besides who says what; it is left out.
        tools: schemas of the tools that may be called in its dialogues; they become a part of its prompt.
    """

    value: dict[str, Any]
    parts_early: bool = False
    alternates: bool = True
    reformed: bool = False
    holds_turns: bool = False
    notes: frozenset[str] = frozenset()
    tools: Tools = field(default_factory=list)
    _dialogues: list[Dialogue] = field(default_factory=list)


def unfold(kind: Kind, value: dict[str, Any]) -> Unfolded:
    """Take a row apart.

    Raises:
        ToolFault: its tools, or what its messages call or answer, are malformed.
        ValueError: its dialogue is broken, or its prompt says something else than its dialogues.
    """
    row = Unfolded(value=dict(value))
    row.tools = read_tools(row.value.pop(TOOLS, None))
    given = _given_prompt(kind, row)
    if kind == "demonstrations" and isinstance(row.value.get("messages"), list):
        row.value["response"] = _read_reply(row, "messages", row.value.pop("messages"), given)
    else:
        _read_replies(kind, row, given)
    if row._dialogues:
        prompts = [dialogue.prompt for dialogue in row._dialogues]
        row.parts_early = len(set(prompts)) > 1
        row.value = {name: item for name, item in row.value.items() if name != "question"} | {"prompt": prompts[0]}
        row.alternates = all(map(alternates, prompts))
    elif given is not None:
        row.alternates, row.holds_turns = alternates(given), holds_turns(given)
    return row


def _given_prompt(kind: Kind, row: Unfolded) -> str | None:
    """The prompt of the row in the one form that every prompt has; null where it has none, or one of a wrong type."""
    value = row.value
    name = next((name for name in _PROMPT_FIELDS if value.get(name) is not None), None)
    if name is None and kind in ("prompts", "heldout_prompts") and isinstance(value.get("messages"), list):
        name = "messages"
    if name is None:
        return None
    prompt = value[name]
    try:
        if isinstance(prompt, list):
            row.notes |= message_notes(prompt)
            rendered = render_turns(prompt, row.tools)
        elif isinstance(prompt, str):
            rendered = read_prompt(prompt)
            row.reformed = rendered != prompt
            rendered = with_tools(rendered, row.tools)
        else:
            return None
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from None
    del value[name]
    value["prompt"] = rendered
    return rendered


def _read_replies(kind: Kind, row: Unfolded, given: str | None) -> None:
    """Take replies out of dialogues, where all of them stand in one, or there is a prompt for those that do not."""
    names = [name for name in REPLIES.get(kind, ()) if name in row.value]
    if given is None and not all(_is_dialogue(item) for name in names for item in _several(row.value[name])):
        return
    for name in names:
        item = row.value[name]
        if kind == "rankings" and isinstance(item, list):
            row.value[name] = [_read_reply(row, name, one, given) for one in item]
        else:
            row.value[name] = _read_reply(row, name, item, given)


def _several(item: Any) -> list[Any]:
    """The replies in a field: those of a ranking, or the one."""
    return item if isinstance(item, list) and not _are_messages(item) else [item]


def _are_messages(item: Any) -> bool:
    return isinstance(item, list) and all(isinstance(one, dict) for one in item)


def _is_dialogue(item: Any) -> bool:
    return _are_messages(item) or (isinstance(item, str) and is_transcript(read_transcript(item)))


def _read_reply(row: Unfolded, name: str, item: Any, given: str | None) -> Any:
    """The reply in a field, whose dialogue is noted; what is none stays as it is."""
    if not _is_dialogue(item) and name != "messages":
        return item
    try:
        if not isinstance(item, str):
            row.notes |= message_notes(item)
        if isinstance(item, str):
            dialogue = parse_transcript(read_transcript(item))
            dialogue = replace(dialogue, prompt=with_tools(dialogue.prompt, row.tools))
        elif given is not None and item and name != "messages" and item[0].get("role") in _GOES_ON:
            dialogue = parse_messages([*prompt_turns(given), *item], row.tools)
            given = None  # it is a part of the dialogue now
        else:
            dialogue = parse_messages(item, row.tools)
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from None
    if given is not None and not _says_the_same(given, dialogue.prompt):
        raise ValueError(f"prompt: says something else than the turns before the reply in {name}")
    row._dialogues.append(dialogue)
    return dialogue.response


def _says_the_same(given: str, prompt: str) -> bool:
    """Whether a prompt says what a dialogue does: all its turns, all but the system's, or the user's first or last."""
    if prompt_identity(given) == prompt_identity(prompt):
        return True
    spoken = spoken_turns(prompt)
    users = [turn.content for turn in spoken if turn.role == "user"]
    turns = tuple(turn for turn in seen_turns(given) if turn.role != "tools")
    question = turns[0].content if len(turns) == 1 else normal_form(given)
    return turns == spoken or (bool(users) and question in (users[0], users[-1]))
