"""The two conversations: with one version, and with two that nobody can tell apart."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flows.chat.speaker import Manner, Spoken, speak
from flows.chat.votes import BlindVote, Verdict, append_vote, why_no_vote
from rlhf_core.errors import DataError
from rlhf_core.serving.served import ServedPolicy
from rlhf_core.text.tool_turns import Message

HELP = "/new begins a new dialogue, /quit ends (as Ctrl-D does); Ctrl-C stops an answer"
BALLOT: Mapping[str, Verdict | None] = {
    "a": "a", "b": "b", "t": "tie", "tie": "tie", "x": "both bad", "both bad": "both bad", "s": None, "skip": None,
}  # fmt: skip
"""What may be typed for a vote; None is none."""


class Terminal(Protocol):
    """Where people read and type."""

    def ask(self, question: str) -> str:
        """A line that is typed; EOFError at the end."""
        ...

    def show(self, text: str) -> None:
        """Show text, at once and with no line end of its own."""
        ...


def questions(terminal: Terminal, on_new: Callable[[], None]) -> Iterator[str]:
    """What is typed, until it ends; commands are obeyed."""
    while True:
        try:
            typed = terminal.ask("you> ").strip()
        except EOFError:
            terminal.show("\n")
            return
        if typed == "/quit":
            return
        if typed == "/new":
            on_new()
            terminal.show("(a new dialogue)\n")
        elif typed.startswith("/"):
            terminal.show(f"({HELP})\n")
        elif typed:
            yield typed


def talk(policy: ServedPolicy, terminal: Terminal, manner: Manner, system: str = "") -> None:
    """Talk with one version until the end of what is typed."""
    opening = _opening(system)
    turns = list(opening)
    terminal.show(f"{policy.name} ({HELP})\n")
    for number, question in enumerate(questions(terminal, lambda: turns.__setitem__(slice(None), opening))):
        turns.append({"role": "user", "content": question})
        terminal.show(f"{policy.name}> ")
        spoken = _answer(policy, terminal, turns, manner, number)
        if spoken is None or not spoken.text.strip():
            turns.pop()  # a turn without text can be no part of a dialogue
        else:
            turns.append({"role": "assistant", "content": spoken.text})


@dataclass(kw_only=True, slots=True)
class BlindSession:
    """A comparison of two versions by one person.

    Attributes:
        policies: the two.
        annotator, file: who votes, and where votes are kept.
        verdicts: for each question the version that won, `tie`, `both bad` or `skipped`.
        kept: how many votes are in the file.
    """

    policies: tuple[ServedPolicy, ServedPolicy]
    annotator: str
    file: Path
    verdicts: list[str] = field(default_factory=list)
    kept: int = 0

    def summary(self) -> str:
        """Who won how often, which is said at the end alone."""
        counts = Counter(self.verdicts)
        named = [*(policy.name for policy in self.policies), "tie", "both bad", "skipped"]
        said = " · ".join(f"{name} {counts[name]}" for name in named)
        lines = [f"{len(self.verdicts)} questions: {said}"]
        if self.kept:
            lines.append(f"{self.kept} votes in {self.file}: rlhf run --data votes={self.file}")
        return "\n".join(lines) + "\n"


def compare_blind(session: BlindSession, terminal: Terminal, manner: Manner, system: str = "") -> None:
    """Have both versions answer each question in an order that nobody knows, and take a vote.

    The dialogue goes on with the answer that was preferred, of a tie with the first; where both are bad or the
    question is skipped it goes on as if it had not been asked. Which version is which is shown at the end, however that
    comes.
    """
    opening = _opening(system)
    turns = list(opening)
    terminal.show(f"two versions, A and B by chance for each question ({HELP})\n")
    try:
        asked = questions(terminal, lambda: turns.__setitem__(slice(None), opening))
        for number, question in enumerate(asked):
            turns.append({"role": "user", "content": question})
            chosen = _one_question(session, terminal, manner, turns, number)
            turns[:] = [*turns, {"role": "assistant", "content": chosen}] if chosen else turns[:-1]
    finally:
        terminal.show(session.summary())


def shown_order(seed: int, number: int) -> tuple[int, int]:
    """Which of the two versions is shown first: by chance, and the same for the same seed and question."""
    return (0, 1) if random.Random(f"{seed}/order/{number}").random() < 0.5 else (1, 0)  # noqa: S311 - no secret


def _one_question(session: BlindSession, terminal: Terminal, manner: Manner, turns: list[Message], number: int) -> str:
    """The answer that the dialogue goes on with, or nothing."""
    first, second = shown_order(manner.seed, number)
    policies = session.policies[first], session.policies[second]
    answers = []
    for letter, policy in zip("AB", policies, strict=True):
        terminal.show(f"{letter}> ")
        answers.append(_answer(policy, terminal, turns, manner, number))
    if answers[0] is None or answers[1] is None or "interrupted" in (answers[0].ending, answers[1].ending):
        session.verdicts.append("skipped")
        return ""
    texts = answers[0].text, answers[1].text
    if reason := why_no_vote(texts):
        terminal.show(f"({reason}: no vote)\n")
        session.verdicts.append("skipped")
        return texts[0].strip()
    since = time.monotonic()
    verdict = _ballot(terminal)
    if verdict is None:
        session.verdicts.append("skipped")
        return ""
    vote = BlindVote(
        turns=turns,
        answers=texts,
        versions=(policies[0].name, policies[1].name),
        verdict=verdict,
        annotator=session.annotator,
        seconds=time.monotonic() - since,
        settings={"seed": manner.seed, "question": number, "temperature": manner.temperature},
    )
    _keep(session, terminal, vote)
    session.verdicts.append(vote.versions["ab".index(verdict)] if verdict in ("a", "b") else verdict)
    return {"a": texts[0], "b": texts[1], "tie": texts[0], "both bad": ""}[verdict]


def _keep(session: BlindSession, terminal: Terminal, vote: BlindVote) -> None:
    try:
        append_vote(session.file, vote)
        session.kept += 1
    except DataError as error:
        terminal.show(f"(this vote counts here and is not kept: {error})\n")


def _ballot(terminal: Terminal) -> Verdict | None:
    while True:
        try:
            typed = terminal.ask("better: a, b, t (tie), x (both bad), s (skip)> ").strip().lower()
        except EOFError:
            terminal.show("\n")
            return None
        if typed in BALLOT:
            return BALLOT[typed]


def _answer(
    policy: ServedPolicy, terminal: Terminal, turns: list[Message], manner: Manner, number: int
) -> Spoken | None:
    """An answer, or None where the model cannot be asked that, which is said."""
    try:
        spoken = speak(policy, turns, manner, number, terminal.show)
    except DataError as error:
        terminal.show(f"\n({error})\n")
        return None
    notes = {"stop": "", "length": " (cut: it is as long as allowed)", "interrupted": " (stopped)"}[spoken.ending]
    left_out = f" ({spoken.turns_left_out} old turns no longer fit)" if spoken.turns_left_out else ""
    terminal.show(f"{notes}{left_out}\n")
    return spoken


def _opening(system: str) -> list[Message]:
    return [{"role": "system", "content": system}] if system.strip() else []
