"""Which turns of a demonstration `sft` learns: all of the assistant's or the last, but no held-out reply."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.data.batching.examples import Turns
from rlhf_core.data.cleaning.asked_later import short_replies, short_reply
from rlhf_core.text.identity import last_group, prompt_group
from rlhf_core.text.transcripts import replies_of
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.notice import warn
from tasks.tables import read_table

Row = Mapping[str, Any]


class LearnedTurns:
    """Takes demonstrations apart, and counts the turns that are not learned.

    These are replies to questions that the rows kept for the held-out loss ask first, and held-out replies (of these
    rows, or of any file) to questions too short to be known alone. The rest of their dialogue is read and learned.

    Args:
        kept: the rows kept for the held-out loss.
        every: all of the assistant's turns are learned, else the last.
    """

    def __init__(self, kept: Sequence[Row], *, every: bool) -> None:
        self._every = every
        self._groups = {prompt_group(row["prompt"]) for row in kept}
        self._replies = {short_reply(row["prompt"], row["response"]) for row in kept}
        self._replies.update(read_table(paths.VALIDATE / "heldout_replies.parquet")["reply"])
        self.left_out = 0

    def of(self, rows: Sequence[Row]) -> list[Turns]:
        """The turns of each training row that are learned."""
        found = []
        for turns in self.all_of(rows):
            found.append([turn for turn in turns if not self._is_held(*turn)])
            self.left_out += len(turns) - len(found[-1])
        return found

    def all_of(self, rows: Sequence[Row]) -> list[Turns]:
        """The turns of each row."""
        texts = [(row["prompt"], row["response"]) for row in rows]
        return [replies_of(*text) if self._every else [text] for text in texts]

    def say(self, stage: Stage) -> None:
        """A line, where turns were left out."""
        if self.left_out:
            warn(stage, f"{self.left_out} turns are read, not learned: their replies are held out (turns_held_out)")

    def figures(self) -> dict[str, int]:
        """For `sft.json`."""
        return {"turns_held_out": self.left_out}

    def _is_held(self, prompt: str, reply: str) -> bool:
        return last_group(prompt) in self._groups or not self._replies.isdisjoint(short_replies(prompt, reply))
