"""What texts lose when a stage makes tokens of them: figures of its metrics, and one line of warning."""

from pathlib import Path

from rlhf_core.errors import DataError
from rlhf_core.text.encoded import TextCounts
from tasks.frame.stage import Stage
from tasks.stages.notice import warn
from tasks.stages.text_lines import texts_line


def count_texts(stage: Stage, name: str) -> TextCounts:
    """Counts to be filled by what encodes some texts of a stage; the same name counts anew and not on top."""
    stage.texts[name] = TextCounts()
    return stage.texts[name]


def text_figures(stage: Stage) -> dict[str, int]:
    """Figures of all that the stage encoded."""
    return sum(stage.texts.values(), TextCounts()).figures()


def warn_of_texts(stage: Stage) -> None:
    """Warn, once what the stage trains on or reads is encoded, of what was lost; without losses say nothing."""
    line = texts_line(text_figures(stage))
    if line:
        warn(stage, line)


def nothing_to_learn(stage: Stage, path: Path, what: str, name: str, otherwise: str) -> DataError:
    """What to raise where nothing of a table counts in a loss: what of its texts was lost, and the cure for that.

    Args:
        path: of the table.
        what: the table has, such as `no pair to learn from`.
        name: under which its texts were counted.
        otherwise: cure where no text was lost.
    """
    counts = stage.texts[name]
    cures = ["raise model.max_response_tokens"] if counts.pairs_equal_when_cut else []
    cures += ["model.chat: plain, or another template"] if counts.responses_rewritten else []
    lost = texts_line(counts.figures())
    return DataError(f"{path}: {what}{f' ({lost})' if lost else ''}. Fix: {'; '.join(cures) or otherwise}")


def no_pairs(stage: Stage, path: Path, name: str) -> DataError:
    """What to raise where a table of pairs leaves none to learn from."""
    cure = "more labelled pairs, or a looser `preferences` section"
    return nothing_to_learn(stage, path, "no pair to learn from", name, cure)
