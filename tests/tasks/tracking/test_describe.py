"""What a version's page says of it where it is compared with nothing."""

import pytest

from tasks.tracking.describe import GENERATED, described
from tasks.tracking.names import ModelVersion


def version(name: str) -> ModelVersion:
    return ModelVersion(
        name=name, version=1, stage="sft", outputs_hash="0", aliases=(), metrics={}, tags={}, run_id="r", created=0.0
    )


@pytest.mark.parametrize(
    ("name", "figures", "line"),
    [
        (
            "rlhf-sft",
            {"heldout_loss": 0.35, "heldout_loss_low": 0.31, "heldout_loss_high": 0.4},
            "**Held-out loss 0.3500 nats a token** (0.310 to 0.400).",
        ),
        (
            "rlhf-sft",
            {"heldout_loss": 0.35, "heldout_loss_low": None, "heldout_loss_high": None},
            "**Held-out loss 0.3500 nats a token**.",
        ),
        (
            "rlhf-reward",
            {"pairwise_accuracy": 0.893, "pairwise_accuracy_low": 0.878, "pairwise_accuracy_high": 0.907},
            "**Right on 89.3% of held-out pairs** (0.878 to 0.907).",
        ),
        ("rlhf-policy", {}, "Not compared with SFT yet."),
    ],
)
def test_the_first_line_says_what_a_version_is_worth_and_how_sure_that_is(
    name: str, figures: dict[str, float | None], line: str
) -> None:
    text = described(version(name), figures, None, "")
    assert text.splitlines()[0] == line
    assert GENERATED in text
