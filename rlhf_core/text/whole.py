"""Whether a chat template wrote all that somebody said: it is a program, and can leave out or rewrite any of it."""

import json
from collections.abc import Iterable

from rlhf_core.text.tool_turns import Conversation, Message, leaves, tool_name


def within(text: str, around: tuple[str, str, str]) -> str:
    """What stands between what the template writes around every reply; letters of that are none of the reply."""
    opening, lead, tail = around
    return text.removeprefix(opening).removeprefix(lead).removesuffix(tail)


def holds_turns(text: str, dialogue: Conversation) -> bool:
    """Whether what user, system and tools say stands in a rendered text, in order, and every call, and every tool that
    may be called. What the assistant said earlier may be written shorter."""
    place = 0
    for turn in dialogue.turns:
        if turn["role"] == "assistant":
            if not _calls_stand(turn, text[place:]):
                return False
            continue
        forms = (turn["content"], json.dumps(turn["content"], ensure_ascii=False)[1:-1])
        found, form = next(((at, form) for form in forms if (at := text.find(form, place)) >= 0), (-1, ""))
        if found < 0 or (form != turn["content"] and turn["role"] != "tool"):
            return False
        place = found + len(form)
    return all(tool_name(tool) in text for tool in dialogue.tools)


def texts_of(turns: Iterable[Message]) -> Iterable[str]:
    """What turns say, and what their calls do."""
    for turn in turns:
        yield turn["content"]
        yield from leaves([call["function"] for call in turn.get("tool_calls", ())])


def stands(turn: Message, text: str) -> bool:
    """Whether a turn of the assistant stands whole in a text: what it says, every name and argument of its calls."""
    return turn["content"] in text and _calls_stand(turn, text)


def _calls_stand(turn: Message, text: str) -> bool:
    functions = [call["function"] for call in turn.get("tool_calls", ())]
    return all(_is_in(leaf, text) for leaf in leaves(functions))


def _is_in(said: str, text: str) -> bool:
    """Whether a text holds what somebody says, as it is or as JSON writes it."""
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text or json.dumps(said)[1:-1] in text
