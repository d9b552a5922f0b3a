"""`rlhf data show`: rows of a file as the tokens that the stages make of them, and which of these are learned."""

import json as json_format
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from flows.root import find_root
from rlhf_core.config import Params
from rlhf_core.data.reading.kinds import Kind
from rlhf_core.data.reading.readers import Refused, Row, read_rows
from rlhf_core.data.reading.records import fault_of, likely_kind, place, to_record
from rlhf_core.errors import ConfigError, DataError
from tasks import paths
from tasks.params import check_params, parse_yaml, resolve_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.data.batching.masks import MaskTotals, RowTokens

GUESSED_FROM = 50


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Which rows are printed, and under which settings they are encoded.

    Parameters
    ----------
    rows:
        How many rows are printed, from the first; the counts are of the whole file in any case.
    row:
        Print this row alone, counted from 1.
    line:
        Print the rows that begin on this line of the file.
    profile:
        A file of profiles/, without .yaml, laid over params.yaml.
    set:
        section.key=value, such as model.max_prompt_tokens=512; may be given several times.
    """

    rows: int = 3
    row: int | None = None
    line: int | None = None
    profile: str | None = None
    set: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = ()

    def picks(self, number: int, line: int) -> bool:
        """Whether the row of a number, which begins on a line, is printed."""
        if self.row is None and self.line is None:
            return number <= self.rows
        return number == self.row or line == self.line


@dataclass(kw_only=True, slots=True)
class ShownRow:
    """A row that is printed: its number, where it stands, its tokens, or why it is none of its kind."""

    number: int
    place: str
    tokens: "RowTokens | None" = None
    fault: str = ""


@dataclass(kw_only=True, slots=True)
class ShownFile:
    """What is printed of a file, and what was counted over all of it; `faults` are rows that are none of the kind."""

    kind: Kind
    totals: "MaskTotals"
    faults: Counter[str] = field(default_factory=Counter)
    rows: list[ShownRow] = field(default_factory=list)


def show(
    file: Path,
    /,
    *,
    model: Path | None = None,
    kind: Kind | None = None,
    options: ShowOptions = ShowOptions(),
    json: bool = False,
) -> int:
    """Print rows of a file as tokens: what of them is learned, what is only read, and what is cut.

    The tokens are those that the stages would make, by the same functions, under model.max_prompt_tokens,
    model.max_response_tokens, model.chat and sft.turns of params.yaml. No weights are loaded and nothing is written. A
    file of which nothing would be learned is an error (exit code 4).

    Parameters
    ----------
    file:
        Of any record kind, in any format that data.* may name.
    model:
        Folder whose tokenizer and chat template write the rows; left out, model.path of params.yaml.
    kind:
        What its rows are, such as comparisons; left out, it is told from the columns.
    json:
        Print everything as JSON.
    """
    from rlhf_core.text.tokenizer import load_tokenizer

    params = _settings(options)
    if model is None and params.model.source == "config":
        raise ConfigError("--model: params.yaml names no folder. Fix: --model FOLDER, such as artifacts/sft/model")
    folder = model or find_root(Path.cwd()) / params.model.path
    known = kind or _told_kind(file)
    tokenizer = load_tokenizer(folder, params.model.chat)
    shown = _look(file, known, tokenizer, params, options)
    if json:
        print(json_format.dumps(_as_json(file, folder, shown, tokenizer), indent=2, ensure_ascii=False))
    else:
        from flows.cli.token_view import print_file

        print_file(file, shown, tokenizer, params.model, sys.stdout)
    _refuse_nothing_learned(file, shown)
    return 0


def _settings(options: ShowOptions) -> Params:
    root = find_root(Path.cwd())
    profile = None if options.profile is None else paths.home(root) / paths.PROFILES / f"{options.profile}.yaml"
    text = resolve_params(root / paths.PARAMS, profile, options.set)
    return check_params(parse_yaml(text, str(paths.PARAMS)), str(paths.PARAMS))


def _told_kind(file: Path) -> Kind:
    """What the rows of a file are.

    Raises:
        DataError: it has no rows, or they fit no kind.
    """
    first = list(islice(read_rows(file), GUESSED_FROM))
    if not first:
        raise DataError(f"{file}: no rows. Fix: name a file with rows")
    found = likely_kind(first)
    if found is None:
        why = fault_of("demonstrations", first[0])
        raise DataError(
            f"{file}:{first[0].line}: rows fit no kind (as demonstrations: {why}). "
            "Fix: name --kind, to see what each row lacks"
        )
    return found


def _look(
    file: Path, kind: Kind, tokenizer: "PreTrainedTokenizerBase", params: Params, options: ShowOptions
) -> ShownFile:
    """Encode every row, and keep those that are asked for.

    Raises:
        ConfigError: there is no such row.
        DataError: the file as a whole cannot be read, or has no rows.
    """
    from rlhf_core.data.batching.masks import MaskLimits, MaskTotals, row_tokens

    limits = MaskLimits(
        max_prompt_tokens=params.model.max_prompt_tokens,
        max_response_tokens=params.model.max_response_tokens,
        turns=params.sft.turns,
    )
    shown = ShownFile(kind=kind, totals=MaskTotals())
    for number, row, fault in _numbered(file, kind):
        tokens = None if fault else row_tokens(tokenizer, kind, to_record(kind, row).values, limits)  # type: ignore[arg-type]
        if tokens is None:
            shown.faults[fault] += 1
        else:
            shown.totals.add(tokens)
        if options.picks(number, row.line):
            shown.rows.append(ShownRow(number=number, place=place(row.line, row.item), tokens=tokens, fault=fault))
    rows = shown.totals.rows + shown.faults.total()
    if not rows:
        raise DataError(f"{file}: no rows. Fix: name a file with rows")
    if not shown.rows and (options.row, options.line) != (None, None):
        asked = f"--row {options.row}" if options.row is not None else f"--line {options.line}"
        raise ConfigError(f"{file}: {asked}: no row is there. Fix: one of its {rows:,} rows")
    return shown


def _numbered(file: Path, kind: Kind) -> Iterator[tuple[int, Row | Refused, str]]:
    """Every row with its number, and why it is none of its kind."""
    for number, row in enumerate(read_rows(file), start=1):
        yield number, row, fault_of(kind, row)


def _refuse_nothing_learned(file: Path, shown: ShownFile) -> None:
    """A file of examples that teach nothing.

    Raises:
        DataError: says so, and why.
    """
    if shown.kind in ("prompts", "heldout_prompts") or shown.totals.learned:
        return
    reasons = (shown.faults + shown.totals.refused).most_common(1)
    why = f" ({reasons[0][0]})" if reasons else ""
    rows = shown.totals.rows + shown.faults.total()
    raise DataError(
        f"{file}: nothing of its {rows:,} rows would be learned{why}. Fix: what the lines above say; another chat "
        "template, model.chat: plain, or larger model.max_prompt_tokens and model.max_response_tokens"
    )


def _as_json(file: Path, folder: Path, shown: ShownFile, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    totals = shown.totals
    return {
        "file": str(file),
        "model": str(folder),
        "kind": shown.kind,
        "chat_template": tokenizer.chat_template is not None,
        "rows": [_row_as_json(row, tokenizer) for row in shown.rows],
        "totals": {
            "rows": totals.rows + shown.faults.total(),
            "rows_of_another_form": dict(shown.faults.most_common()),
            "rows_refused": dict(totals.refused.most_common()),
            "rows_without_targets": totals.without_targets,
            "tokens_learned": totals.learned,
            "tokens_read": totals.read,
            "tokens_cut_from_prompts": totals.cut_from_prompts,
            "tokens_cut_from_responses": totals.cut_from_responses,
            "texts": totals.counts.figures(),
        },
    }


def _row_as_json(row: ShownRow, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    found: dict[str, Any] = {"row": row.number, "place": row.place, "fault": row.fault or None}
    if row.tokens is None:
        return found | {"sequences": []}
    sequences = [
        asdict(sequence) | {"tokens": [tokenizer.decode([token]) for token in sequence.ids]}
        for sequence in row.tokens.sequences
    ]
    return found | {
        "refused": row.tokens.refused or None,
        "sequences": sequences,
        "cut_from_prompt": row.tokens.cut_from_prompt,
        "cut_from_responses": row.tokens.cut_from_responses,
        "cut_ends": row.tokens.cut_ends,
        "texts": row.tokens.counts.figures(),
    }
