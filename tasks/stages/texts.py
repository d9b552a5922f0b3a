"""What texts lose when a stage makes tokens of them: figures of its metrics, and one line of warning."""

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
