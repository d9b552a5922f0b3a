"""Dialogues with tools: calls of the assistant, what the tools answered, and the schemas of those it may call.

Such a dialogue is text in every table, as all prompts are (`rlhf_core.text.transcripts`), but JSON and no transcript:
what a tool answers may hold anything, lines that begin turns among it. The JSON has one form, and a text in another one
is an ordinary text: `{"tools": [...], "messages": [...]}` for what was said before a reply, `{"content": ...,
"tool_calls": [...]}` for a reply that calls tools. Calls have the form of OpenAI's, arguments as objects.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any, NamedTuple

from rlhf_core.text.normal import REFUSED_CHARACTERS

Message = dict[str, Any]
"""A turn: `role` (system, user, assistant or tool), `content`; of an assistant that calls tools also `tool_calls`, of
what a tool answered `name` and `tool_call_id` where they were given."""
Tools = list[dict[str, Any]]

_NOTHING: tuple[Any, ...] = (None, "", [], {})
_PROMPT_START, _REPLY_START = '{"tools": [', '{"content": "'
_CALLS_FIELD = '"tool_calls": ['
_ROLES = ("system", "user", "assistant", "tool")
_OF_RESULT = ("name", "tool_call_id")


class ToolFault(ValueError):
    """Tools, a call or an answer of a tool that has not the form it must have."""


class Conversation(NamedTuple):
    """The turns of a dialogue, and the schemas of the tools that the assistant may call; mostly none."""

    turns: Sequence[Message]
    tools: Tools


def read_tools(value: Any) -> Tools:
    """The schemas in a row's `tools`: a list of objects that name a function each, or the JSON of one.

    Raises:
        ToolFault: it is anything else.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "tools")
    if value in _NOTHING:
        return []
    if not isinstance(value, list):
        raise ToolFault("tools: is no list of tools. Leave the column out, or give one schema a tool")
    for number, tool in enumerate(value, start=1):
        if not isinstance(tool, dict) or not tool_name(tool):
            raise ToolFault(f"tools: item {number} is no object with the name of a function")
    return deepcopy(value)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool by its schema, OpenAI's (under `function`) or a bare one; empty where it has none."""
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def read_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """The `tool_calls` of a message in one form.

    Args:
        number: of the message, for what is raised.

    Raises:
        ToolFault: a call has no name, or arguments that are no object.
    """
    if not isinstance(value, list):
        raise ToolFault(f"message {number}: tool_calls is no list")
    return [_read_call(call, f"message {number}: tool call {place}") for place, call in enumerate(value, start=1)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict) or call.get("type") not in (None, "function"):
        raise ToolFault(f"{where} is no call of a function")
    inner = call.get("function") or call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise ToolFault(f"{where} names no function")
    arguments = inner.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments, f"{where}: arguments")
    arguments = {} if arguments in _NOTHING else arguments
    if not isinstance(arguments, dict):
        raise ToolFault(f"{where}: arguments are no JSON object")
    identity = call.get("id")
    if identity is not None and not isinstance(identity, str):
        raise ToolFault(f"{where}: id is no text")
    return ({"id": identity} if identity else {}) | {
        "type": "function",
        "function": {"name": inner["name"].strip(), "arguments": deepcopy(arguments)},
    }


def check_results(turns: Sequence[Message]) -> None:
    """Refuse what a tool answered without having been asked.

    Raises:
        ToolFault: no call stands before it, or none with its id.
    """
    asked: list[dict[str, Any]] = []
    for number, turn in enumerate(turns, start=1):
        if turn["role"] != "tool":
            asked = turn.get("tool_calls", [])
            continue
        if not asked:
            raise ToolFault(f"message {number} has role 'tool', but no message before it calls a tool")
        known = [call["id"] for call in asked if "id" in call]
        if known and turn.get("tool_call_id") not in (None, *known):
            raise ToolFault(f"message {number}: tool_call_id {str(turn['tool_call_id'])[:40]!r} is the id of no call")


def uses_tools(turns: Sequence[Message], tools: Tools) -> bool:
    """Whether a dialogue is more than a transcript can hold."""
    return bool(tools) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)


def write_dialogue(turns: Sequence[Message], tools: Tools) -> str:
    """A dialogue, after which the assistant is to speak, as the text of a prompt."""
    return json.dumps({"tools": tools, "messages": list(turns)}, ensure_ascii=False)


def read_dialogue(text: str) -> Conversation | None:
    """The dialogue that a prompt is as JSON; null for any other text."""
    found = _read_dialogue(text.strip()) if text.lstrip().startswith(_PROMPT_START) else None
    return deepcopy(found)


def write_reply(turn: Message) -> str:
    """A reply as the text of a response: what it says, or JSON where it calls tools."""
    if not turn.get("tool_calls"):
        return str(turn["content"]).strip()
    return json.dumps({"content": turn["content"].strip(), "tool_calls": turn["tool_calls"]}, ensure_ascii=False)


def read_reply(text: str) -> Message | None:
    """The turn of the assistant that a response is as JSON, as it calls tools; null for any other text."""
    if not (text.lstrip().startswith(_REPLY_START) and _CALLS_FIELD in text):
        return None
    return deepcopy(_read_reply(text.strip()))


def leaves(value: Any) -> Iterator[str]:
    """Every text in a JSON value, and its numbers and words as JSON writes them; no keys."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def said_by_calls(turn: Message) -> str:
    """What the calls of a turn say: names and arguments, without ids, which a server makes up anew each time."""
    functions = [call["function"] for call in turn.get("tool_calls", ())]
    return json.dumps(functions, ensure_ascii=False, sort_keys=True) if functions else ""


def with_changed_texts(dialogue: Conversation, change: Callable[[str, str], str]) -> Conversation:
    """A dialogue with every text in it changed; `change` gets the text, and the role of who wrote it."""
    turns = []
    for turn in dialogue.turns:
        calls = [
            call | {"function": _each_text(call["function"], lambda text: change(text, "assistant"))}
            for call in turn.get("tool_calls", ())
        ]
        content = {"content": change(turn["content"], turn["role"])}
        turns.append(turn | content | ({"tool_calls": calls} if calls else {}))
    return Conversation(turns, _each_text(dialogue.tools, lambda text: change(text, "system")))


@lru_cache(maxsize=256)
def _read_dialogue(text: str) -> Conversation | None:
    value = _object_in(text)
    if value is None or list(value) != ["tools", "messages"] or not isinstance(value["messages"], list):
        return None
    try:
        tools = read_tools(value["tools"])
        turns = [_read_turn(turn, number) for number, turn in enumerate(value["messages"], start=1)]
        check_results(turns)
    except ToolFault:
        return None
    return Conversation(turns, tools) if turns and write_dialogue(turns, tools) == text else None


@lru_cache(maxsize=256)
def _read_reply(text: str) -> Message | None:
    value = _object_in(text)
    if value is None or list(value) != ["content", "tool_calls"] or not value["tool_calls"]:
        return None
    try:
        turn = _read_turn({"role": "assistant"} | value, 1)
    except ToolFault:
        return None
    return turn if write_reply(turn) == text else None


def _read_turn(turn: Any, number: int) -> Message:
    """A turn of the one JSON form; any other is refused here, or not the same once it is written again."""
    if not isinstance(turn, dict) or turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
        raise ToolFault(f"message {number} is no turn")
    found: Message = {"role": turn["role"], "content": turn["content"]}
    if turn["role"] == "assistant" and turn.get("tool_calls"):
        found["tool_calls"] = read_calls(turn["tool_calls"], number)
    if turn["role"] == "tool":
        found |= {name: turn[name] for name in _OF_RESULT if isinstance(turn.get(name), str)}
    return found


def _object_in(text: str) -> dict[str, Any] | None:
    try:
        value = _parsed(text, "")
    except ToolFault:
        return None
    return value if isinstance(value, dict) else None


def _parsed(text: str, where: str) -> Any:
    """A JSON value without what no row may hold: numbers that are not finite, control characters."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ToolFault(f"{where} are not JSON ({error})") from None
    if any(REFUSED_CHARACTERS.search(leaf) for leaf in leaves(value)):
        raise ToolFault(f"{where} hold control characters")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a finite number")


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, but no key."""
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
