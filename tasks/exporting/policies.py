"""A policy written in a form, and both asked the same prompts."""

from collections.abc import Callable
from pathlib import Path

from rlhf_core.models.policy import load_policy
from rlhf_core.text.tokenizer import load_tokenizer
from tasks.exporting.form import Made, Order, Source, WrittenForm
from tasks.exporting.hf import refuse_mixture
from tasks.exporting.parity import TOLERANCE, check_answers
from tasks.exporting.reference import answers_of
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
        written = write(source, folder)
        order.tell(f"{subject.reference} answers {len(order.texts)} held-out prompts")
        reference = answers_of(source.model, source.tokenizer, subject, order.texts)
        order.tell(f"a process without this project reads the folder as {name} and answers them too")
        return Made(written, check_answers(reference, name, {"folder": str(folder), **written.named}, tolerance))

    return make
