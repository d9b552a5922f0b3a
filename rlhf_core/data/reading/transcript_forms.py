"""Texts that are nearly a transcript, read as what they are: brought into the form of `rlhf_core.text.transcripts`.

People lose line ends and blanks at both ends of a text, write `\\r\\n`, one line end between turns in place of two, or
no `Assistant:` at the end. A text that begins with a turn of the human, or has one and ends in `Assistant:`, is a
dialogue.
"""

import re
from dataclasses import dataclass

from rlhf_core.text.normal import visible, without_hidden
from rlhf_core.text.transcripts import ASSISTANT, HUMAN, is_dialogue

_APART = re.compile(r"(?:\A\s*|\n[^\S\n]*\n\s*)(Human|Assistant)[^\S\n]*:", re.IGNORECASE)
_CLOSE = re.compile(r"(?:\A\s*|\n[^\S\n]*)(Human|Assistant)[^\S\n]*:", re.IGNORECASE)
_FOREIGN_HUMAN = re.compile(
    r"^(?:[^\S\n]*[#*<_]*[^\S\n]*(?:human|user|prompter)|[^\S\n]*#+[^\S\n]*(?:instruction|input))[*>_]*[^\S\n]*[:\uff1a]",
    re.IGNORECASE | re.MULTILINE,
)
_FOREIGN_ASSISTANT = re.compile(
    r"(?:^|\s)(?:[#*<_]*[^\S\n]*(?:assistant|ai|bot|gpt)|#+[^\S\n]*response)[*>_]*[^\S\n]*[:\uff1a]",
    re.IGNORECASE | re.MULTILINE,
)
_CONTROL = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant|prompter|human)\|>",
    re.IGNORECASE,
)
_MARKS = {"Human": HUMAN, "Assistant": ASSISTANT}


@dataclass(frozen=True, slots=True)
class _Parts:
    before: str
    turns: list[tuple[str, str]]  # speaker and content, stripped

    def render(self) -> str:
        """The text in the one form of a transcript."""
        spoken = (f"{_MARKS[speaker]} {content}" if content else _MARKS[speaker] for speaker, content in self.turns)
        return self.before + "".join(spoken)


def read_prompt(text: str) -> str:
    """A prompt in one form: a text that is nearly a dialogue as one, any other as it is.

    Raises:
        ValueError: it begins like a transcript and ends in the middle of the assistant's turn.
    """
    parts = _parts(text)
    if parts is None or (is_dialogue(text) and (parts.before or text.startswith((HUMAN, ASSISTANT)))):
        return text
    (speaker, content), begins = parts.turns[-1], _begins_with_human(parts)
    if speaker == "Assistant" and content:
        if begins:
            raise ValueError("begins like a transcript and ends within a turn of the assistant")
        return text
    if speaker == "Human":
        if not begins:
            return text
        parts.turns.append(("Assistant", ""))
    return parts.render()


def read_transcript(text: str) -> str:
    """A reply that is nearly a whole transcript as one; any other text as it is."""
    parts = _parts(text)
    if parts is None or text.startswith((HUMAN, ASSISTANT)) or not _begins_with_human(parts):
        return text
    return parts.render() if any(speaker == "Assistant" for speaker, _ in parts.turns) else text


def holds_turns(text: str) -> bool:
    """Whether a text that is no dialogue has lines that begin turns, also in the manner of other templates.

    Those are not read as turns, as a text may well speak of them: `### Human:`, `User:`, `**Human:**` before a line of
    the assistant's, `### Instruction:` before `### Response:`, and control tokens of ChatML, Llama, Mistral and Gemma.
    """
    if is_dialogue(text):
        return False
    if _parts(text) is not None or _CONTROL.search(text):
        return True
    asked = _FOREIGN_HUMAN.search(text)
    return asked is not None and _FOREIGN_ASSISTANT.search(text, asked.end()) is not None


def _begins_with_human(parts: _Parts) -> bool:
    return not parts.before and parts.turns[0][0] == "Human"


def _parts(text: str) -> _Parts | None:
    """The turns of a text in which a human speaks, or None.

    Blank lines part the turns; where none of them does, as the last turn then is still the human's, line ends do.
    """
    text = without_hidden(text).replace("\r\n", "\n").replace("\r", "\n")
    found = _split(text, _APART)
    if found is None or (len(found.turns) == 1 or found.turns[-1][0] == "Human"):
        closer = _split(text, _CLOSE)
        if closer is not None and closer.turns[-1] == ("Assistant", ""):
            return closer
    return found


def _split(text: str, mark: re.Pattern[str]) -> _Parts | None:
    before, *rest = mark.split(text)
    turns = [(speaker.capitalize(), content.strip()) for speaker, content in zip(rest[::2], rest[1::2], strict=True)]
    if not any(speaker == "Human" for speaker, _ in turns):
        return None
    return _Parts(before.strip() if visible(before) else "", turns)
