"""A text as tokens, what became of it on the way, and how many texts of a stage lost something."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple


class Encoded(NamedTuple):
    """Tokens of a prompt or a response.

    Attributes:
        ids: the tokens.
        is_cut: some did not fit into the limit: the beginning of a prompt, the end of a response.
        is_whole: what the chat template wrote, before it was cut, contains the text as it was given: of a response all
            of it, of a prompt what user and system say in it; and the tokenizer has tokens of letters for it.
    """

    ids: list[int]
    is_cut: bool = False
    is_whole: bool = True


@dataclass(kw_only=True, slots=True)
class TextCounts:
    """How many prompts, responses and pairs became tokens, and how many of them not as they were given.

    Attributes:
        prompts_encoded, responses_encoded, pairs_encoded: all of them.
        prompts_cut: prompts that lost their beginning to the limit, turns or tokens.
        responses_cut: responses that lost their end to the limit, the end token with it.
        prompts_rewritten: prompts of which chat template or tokenizer leave out or rewrite a turn of user or system.
        responses_rewritten: responses that chat template or tokenizer do not write whole; training refuses their rows.
        scored_cut: prompts with their response that lost their beginning to the limit of a reward model from elsewhere.
        scored_rewritten: such of which its chat template or tokenizer leave out or rewrite something.
        pairs_equal_when_cut: pairs whose two different responses are the same tokens once they are cut.
        demonstrations_encoded, demonstrations_without_targets: demonstrations, and those of which no reply is learned.
    """

    prompts_encoded: int = 0
    prompts_cut: int = 0
    prompts_rewritten: int = 0
    responses_encoded: int = 0
    responses_cut: int = 0
    responses_rewritten: int = 0
    scored_encoded: int = 0
    scored_cut: int = 0
    scored_rewritten: int = 0
    pairs_encoded: int = 0
    pairs_equal_when_cut: int = 0
    demonstrations_encoded: int = 0
    demonstrations_without_targets: int = 0

    def add_prompts(self, prompts: Iterable[Encoded]) -> None:
        """Count prompts."""
        for prompt in prompts:
            self.prompts_encoded += 1
            self.prompts_cut += prompt.is_cut
            self.prompts_rewritten += not prompt.is_whole

    def add_responses(self, responses: Iterable[Encoded]) -> None:
        """Count responses."""
        for response in responses:
            self.responses_encoded += 1
            self.responses_cut += response.is_cut
            self.responses_rewritten += not response.is_whole

    def add_scored(self, rows: Iterable[Encoded]) -> None:
        """Count prompts with their response, as a reward model from elsewhere reads them."""
        for row in rows:
            self.scored_encoded += 1
            self.scored_cut += row.is_cut
            self.scored_rewritten += not row.is_whole

    def figures(self) -> dict[str, int]:
        """The counts of what was encoded at all: no prompts, no figures of prompts. Of demonstrations only where some
        of them teach nothing: how many there are, other figures say."""
        everything = asdict(self)
        kinds = [kind for kind in ("prompts", "responses", "scored", "pairs") if everything[f"{kind}_encoded"]]
        kinds += ["demonstrations"] if self.demonstrations_without_targets else []
        return {name: count for name, count in everything.items() if name.startswith(tuple(kinds) or ("-",))}

    def __add__(self, other: "TextCounts") -> "TextCounts":
        mine, others = asdict(self), asdict(other)
        return TextCounts(**{name: count + others[name] for name, count in mine.items()})
