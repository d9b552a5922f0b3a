"""Which prompts are held out: decided once, in `validate`, from all files."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from rlhf_core.config import DataConfig
from rlhf_core.data.cleaning.asked_later import prompts_within, short_replies, short_reply, whole_prompt
from rlhf_core.data.cleaning.splits import SplitRule, heldout_groups, is_heldout, next_heldout, unit_of
from rlhf_core.data.reading.judgements import RESPONSES, responses_of
from rlhf_core.data.reading.kinds import Kind
from rlhf_core.data.reading.records import Record
from rlhf_core.errors import DataError
from rlhf_core.text.identity import later_groups, prompt_group, prompt_identity
from tasks.frame.stage import Stage
from tasks.stages.notice import warn
from tasks.stages.validate.derived import Records, derived_prompts
from tasks.stages.validate.screening import ASKED_LATER, DUPLICATE, HELD_ELSEWHERE, HELD_REPLY, Screening

SPLIT_KINDS: tuple[Kind, ...] = ("demonstrations", "prompts", "votes", "comparisons", "rankings", "graded")
"""The kinds whose rows are on one side or the other; named held-out prompts are held out."""


class Sides:
    """Which prompts are held out, and the rows that cannot stand on either side beside them.

    Attributes:
        split: which prompts are held out.
        replies: identities of held-out replies to prompts too short to be known by their question
            (`asked_later.short_reply`); of demonstrations `sft` leaves out the turns that learn one.
    """

    def __init__(self, screenings: Mapping[Kind, Screening], config: DataConfig) -> None:
        """Decide them from the good rows of all files.

        Raises:
            DataError: no row has a value in the column that `data.split_by` names.
        """
        self._config = config
        self._verdicts = [screenings[kind] for kind in SPLIT_KINDS if kind in screenings]
        named = screenings.get("heldout_prompts")
        self._named = {prompt_group(prompt) for prompt in (_prompts(named) if named else ())}
        self._refuse_absent_column()
        rows = [(record.values["prompt"], self._unit(record)) for one in self._verdicts for record in one.kept]
        self._units = {unit for _, unit in rows if is_heldout(unit, config.hashed_share)}
        self._units |= self._at_least_one({kind: one.kept for kind, one in screenings.items()})
        self.split = SplitRule(frozenset(self._named | heldout_groups(rows, self._units)))
        self._alone = [screenings[kind] for kind in ("prompts", "heldout_prompts") if kind in screenings]
        held = [
            (one.kind, record)
            for one in [*self._verdicts, *([named] if named else ())]
            for record in one.kept
            if self.split(record.values["prompt"]) == "heldout"
        ]
        self._whole = {whole_prompt(record.values["prompt"]) for _, record in held}
        self.replies = {
            identity
            for kind, record in held
            for reply in _replies(kind, record)
            if (identity := short_reply(record.values["prompt"], reply))
        }

    def set_aside(self) -> None:
        """Put into the quarantine what stands between the sides, and prompts that stand there twice in other forms."""
        for screening in self._alone:
            _keep(screening, _Twice(screening).reason, DUPLICATE)
        for screening in self._verdicts:
            _keep(screening, self._asks_later, ASKED_LATER)
            _keep(screening, self._is_held_elsewhere, HELD_ELSEWHERE)
            if screening.kind in RESPONSES:
                _keep(screening, partial(self._judges_held_reply, screening.kind), HELD_REPLY)

    def say(self, stage: Stage) -> None:
        """One line for each file of which rows were set aside, and for rows without the column."""
        for screening in self._verdicts:
            if count := screening.count(ASKED_LATER):
                warn(stage, f"{screening.file}: {count} rows are left out: they ask later what a held-out prompt asks")
            if count := screening.count(HELD_REPLY):
                warn(stage, f"{screening.file}: {count} rows are left out: they judge a held-out reply elsewhere")
            if count := screening.count(HELD_ELSEWHERE):
                warn(
                    stage,
                    f"{screening.file}: {count} training rows have prompts that are held out with another "
                    f"{self._config.split_by}; they are left out",
                )
            if self._config.split_by and (lacking := sum(record.unit is None for record in screening.kept)):
                warn(
                    stage,
                    f"{screening.file}: {lacking} of {len(screening.kept)} rows have no {self._config.split_by!r} "
                    "(data.split_by); they are on the side of their prompt",
                )

    def _at_least_one(self, records: Records) -> set[str]:
        """A unit to hold out where a share is asked for and so few leave no prompt in it: the next in order."""
        if self._named or not self._config.hashed_share:
            return set()
        units = {self._unit(record) for record in records.get("prompts") or derived_prompts(records)}
        return set() if len(units) < 2 or units & self._units else {next_heldout(units)}

    def _asks_later(self, record: Record) -> str | None:
        prompt = record.values["prompt"]
        if self.split(prompt) == "heldout":
            return None
        if self.split.groups.isdisjoint(later_groups(prompt)) and self._whole.isdisjoint(prompts_within(prompt)):
            return None
        return "prompt: the dialogue asks later what a held-out prompt asks"

    def _judges_held_reply(self, kind: Kind, record: Record) -> str | None:
        prompt = record.values["prompt"]
        if self.split(prompt) == "heldout":
            return None
        if all(self.replies.isdisjoint(short_replies(prompt, reply)) for reply in _replies(kind, record)):
            return None
        return "prompt: asks last what a held-out prompt asks, and a response is a held-out reply to it"

    def _is_held_elsewhere(self, record: Record) -> str | None:
        prompt = record.values["prompt"]
        if record.unit is None or self.split(prompt) == "train" or prompt_group(prompt) in self._named:
            return None
        if self._unit(record) in self._units:
            return None
        return f"prompt: is held out with another {self._config.split_by}"

    def _unit(self, record: Record) -> str:
        return unit_of(record.values["prompt"], self._config.split_by, record.unit)

    def _refuse_absent_column(self) -> None:
        column = self._config.split_by
        kept = [record for screening in self._verdicts for record in screening.kept]
        if column is not None and kept and all(record.unit is None for record in kept):
            raise DataError(
                f"data.split_by: no row of {', '.join(screening.file for screening in self._verdicts)} has a value in "
                f"the column {column!r}. Fix: name a column of these files, or null to split by dialogue"
            )


class _Twice:
    """Finds prompts that an earlier row has in another form."""

    def __init__(self, screening: Screening) -> None:
        self._first: dict[str, Record] = {}
        for record in screening.kept:
            self._first.setdefault(prompt_identity(record.values["prompt"]), record)

    def reason(self, record: Record) -> str | None:
        first = self._first[prompt_identity(record.values["prompt"])]
        return None if first is record else f"prompt: is the one at {first.place} in another form"


def _prompts(screening: Screening) -> Iterable[str]:
    return (record.values["prompt"] for record in screening.kept)


def _replies(kind: Kind, record: Record) -> list[str]:
    return [record.values["response"]] if kind == "demonstrations" else responses_of(kind, record.values)


def _keep(screening: Screening, reason_of: Callable[[Record], str | None], code: str) -> None:
    kept = []
    for record in screening.kept:
        if reason := reason_of(record):
            screening.set_aside(record, reason, [code])
        else:
            kept.append(record)
    screening.kept = kept
