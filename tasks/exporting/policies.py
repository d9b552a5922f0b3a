"""A policy written in a form, and both asked the same prompts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlhf_core.models.policy import load_policy
from rlhf_core.text.tokenizer import load_tokenizer
from tasks.exporting.form import Made, Order, Source, WrittenForm
from tasks.exporting.hf import refuse_mixture
from tasks.exporting.parity import TOLERANCE, check_answers
from tasks.exporting.reference import answers_of, greedy_of
from tasks.exporting.subject import FormatName

Writer = Callable[[Source, Path], WrittenForm]


def policy_as(name: FormatName, write: Writer, tolerance: float = TOLERANCE) -> Callable[[Order, Path], Made]:
    """How a policy is made into a form.

    Args:
        name: of the form, and of the stranger's reader.
        write: writes it into a folder that is there and empty.
        tolerance: largest difference of log-probabilities.
    """

    def make(order: Order, folder: Path) -> Made:
        subject = order.subject
        refuse_mixture(subject.folder, subject.reference)
        source = Source(
            subject=subject,
            model=load_policy(subject.folder),
            tokenizer=load_tokenizer(subject.folder),
            numbers=order.numbers,
        )
        before = greedy_of(source.model, source.tokenizer, subject, order.texts) if order.numbers == "float16" else None
        written = write(source, folder)
        order.tell(f"{subject.reference} answers {len(order.texts)} held-out prompts")
        reference = answers_of(source.model, source.tokenizer, subject, order.texts)
        if before is not None:
            written = _rounded(written, before, reference.responses)
        order.tell(f"a process without this project reads the folder as {name} and answers them too")
        return Made(written, check_answers(reference, name, {"folder": str(folder), **written.named}, tolerance))

    return make


def _rounded(written: WrittenForm, before: list[list[int]], after: list[list[int]]) -> WrittenForm:
    """Say how much of what the version writes is left by rounding, which the check of the file cannot see."""
    equal = sum(one == other for one, other in zip(before, after, strict=True))
    line = f"rounded, it writes the same greedy tokens as the registered version on {equal} of {len(before)} prompts"
    said = {**written.said, "greedy_equal_unrounded": equal}
    return replace(written, limits=(*written.limits, line), said=said)
