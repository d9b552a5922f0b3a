"""Rows as tokens for a terminal: learned ones green and in brackets, so that pipes and NO_COLOR lose nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from rlhf_core.config import ModelConfig
from tasks.stages.text_lines import texts_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flows.cli.show import ShownFile, ShownRow
    from rlhf_core.data.batching.masks import MaskedTokens, RowTokens

OPEN, CLOSE, BETWEEN, LINE_END = "⟦", "⟧", "|", "⏎"
LEARNED, CONTROL, READ, WARNING = "bold green", "magenta", "default", "yellow"
UNKNOWN, PART, MOST_OF_A_LETTER = "\ufffd", "…", 8
LEGEND = (
    f"{OPEN}learned{CLOSE}, the rest is read; {BETWEEN} between tokens, {PART} part of a letter, {LINE_END} line end"
)
END_SHOWN = 80
REASONS_LISTED = 5


def print_file(
    file: Path, shown: "ShownFile", tokenizer: "PreTrainedTokenizerBase", limits: ModelConfig, stream: IO[str]
) -> None:
    """Print the rows that were asked for, and the counts of the whole file."""
    console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
    template = "its chat template" if tokenizer.chat_template is not None else "no chat template: plain text"
    console.print(f"{file}: {shown.kind} · {template} · {LEGEND}")
    for row in shown.rows:
        console.print()
        _print_row(console, row, tokenizer)
    console.print()
    _print_totals(console, shown, limits)


def _print_row(console: Console, row: "ShownRow", tokenizer: "PreTrainedTokenizerBase") -> None:
    head = f"row {row.number} ({row.place})"
    if row.tokens is None:
        console.print(Text(f"{head} is not of this kind: {row.fault}", WARNING))
        return
    if row.tokens.refused:
        console.print(Text(f"{head}: refused: {row.tokens.refused}", WARNING))
        return
    for sequence in row.tokens.sequences:
        learned = sum(sequence.mask)
        counts = f"{learned} learned, {len(sequence.ids) - learned} read"
        console.print(Text(f"{head} · {sequence.name} · {len(sequence.ids)} tokens: {counts}", "bold"))
        console.print(tokens_text(sequence, tokenizer))
    for note in _notes(row.tokens):
        console.print(Text(note, WARNING))


def tokens_text(sequence: "MaskedTokens", tokenizer: "PreTrainedTokenizerBase") -> Text:
    """Tokens one after the other, runs of learned ones in brackets; a new line after each line end."""
    text = Text()
    before = 0
    for (letters, is_control), learned in zip(_spelled(tokenizer, sequence.ids), sequence.mask, strict=True):
        if learned and not before:
            text.append(OPEN, LEARNED)
        elif before and not learned:
            text.append(CLOSE, LEARNED)
        elif text and not text.plain.endswith("\n"):
            text.append(BETWEEN, "dim")
        text.append(letters, LEARNED if learned else CONTROL if is_control else READ)
        before = learned
    if before:
        text.append(CLOSE, LEARNED)
    text.rstrip()
    return text


def _spelled(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Letters of each token, and whether it is one of control; a letter of several tokens stands at its last one."""
    control = tokenizer.added_tokens_decoder
    begun: list[int] = []
    for token in ids:
        letters = tokenizer.decode([*begun, token])
        begun = [*begun, token] if letters.endswith(UNKNOWN) and len(begun) < MOST_OF_A_LETTER else []
        yield (PART if begun else letters.replace("\n", f"{LINE_END}\n")), token in control


def _notes(row: "RowTokens") -> Sequence[str]:
    """What a row lost on its way to these tokens."""
    cut = [f"cut: {row.cut_from_prompt} tokens of the prompt's beginning"] if row.cut_from_prompt else []
    cut += [f"cut: the end {end[:END_SHOWN]!r}" for end in row.cut_ends]
    line = texts_line(row.counts.figures())
    return [*cut, line] if line else cut


def _print_totals(console: Console, shown: "ShownFile", limits: ModelConfig) -> None:
    totals = shown.totals
    rows = totals.rows + shown.faults.total()
    console.print(
        f"all {rows:,} rows: {totals.learned:,} tokens learned, {totals.read:,} read and not learned, "
        f"{totals.cut_from_prompts:,} cut from prompts (model.max_prompt_tokens {limits.max_prompt_tokens:,}), "
        f"{totals.cut_from_responses:,} cut from responses (model.max_response_tokens {limits.max_response_tokens:,})"
    )
    if totals.without_targets and shown.kind not in ("prompts", "heldout_prompts"):
        console.print(Text(f"{totals.without_targets:,} of {totals.rows:,} rows teach nothing", WARNING))
    if line := texts_line(totals.counts.figures()):
        console.print(Text(line, WARNING))
    for words, reasons in (("not of this kind", shown.faults), ("refused", totals.refused)):
        for reason, count in reasons.most_common(REASONS_LISTED):
            console.print(Text(f"{count:,} of {rows:,} rows {words}: {reason}", WARNING))
        if len(reasons) > REASONS_LISTED:
            console.print(Text(f"and {len(reasons) - REASONS_LISTED:,} other reasons", WARNING))
