"""What a training dialogue asks or learns later although it is held out: in other words than its first question alone.

A question of four words or more says by itself what it is (`identity.later_questions`). A shorter one does not: `And
why?` stands in many dialogues, and means something else in each. So what counts are

- the turns that lead to it: a held-out prompt that begins shortly, but says four words in all, is asked again where all
  its turns stand one after another within a longer dialogue;
- the reply: where a held-out prompt is so short as a whole, what must not be learned is its held-out reply, after the
  same turns. Other replies to `Thank you.` say nothing about it.

Turns are compared in the normal form of `identity.seen_turns`, without those of the system and its tools.
"""

from collections.abc import Sequence

from rlhf_core.text.identity import QUESTION_WORDS, Turn, content_id, seen_reply, spoken_turns
from rlhf_core.text.likeness import num_words
from rlhf_core.text.normal import normal_form


def whole_prompt(prompt: str) -> str | None:
    """Identity of a held-out prompt of several questions, four words or more in all; null of any other."""
    turns = spoken_turns(prompt)
    several = sum(turn.role == "user" for turn in turns) > 1
    return _identity(turns) if several and not _is_short(turns) else None


def prompts_within(prompt: str) -> set[str]:
    """The identities of all prompts whose turns stand within a dialogue, but not at its beginning."""
    turns = spoken_turns(prompt)
    ends = [place + 1 for place, turn in enumerate(turns) if turn.role == "user"]
    return {_identity(turns[start:end]) for end in ends for start in range(1, end)}


def short_reply(prompt: str, reply: str) -> str | None:
    """Identity of a held-out reply to a prompt of under four words; null of any other or an unseen one."""
    turns = spoken_turns(prompt)
    return _identity(turns, reply) if turns and _is_short(turns) and normal_form(reply) else None


def short_replies(prompt: str, reply: str) -> set[str]:
    """The identities that a reply has as one to the last turns of a dialogue, where these have under four words."""
    turns = spoken_turns(prompt)
    endings = (turns[start:] for start in range(1, len(turns)))
    return {_identity(ending, reply) for ending in endings if _is_short(ending)} if normal_form(reply) else set()


def _is_short(turns: Sequence[Turn]) -> bool:
    return sum(num_words(turn.content) for turn in turns if turn.role == "user") < QUESTION_WORDS


def _identity(turns: Sequence[Turn], reply: str | None = None) -> str:
    said = [f"{turn.role}\0{turn.content}" for turn in turns]
    replied = [] if reply is None else [normal_form(seen_reply(reply))]
    return content_id("\0\0".join([*said, *replied]))
