"""The figures of a whole run: which, under which names."""

import json
from pathlib import Path

from rlhf_core.config import Params
from tasks.stages.report.headline import headline_figures, run_figures
from tasks.stages.report.html.sources import read_run


def test_policies_keep_their_figures_apart() -> None:
    found = headline_figures(
        [
            ("sft", {"heldout_loss": 0.35, "steps": 550, "stopped_early": False}),
            ("align@ppo", {"train_score": 1.4}),
            ("align@dpo", {"train_score": 1.1}),
            (
                "evaluate",
                {
                    "verdict": {"win_rate": 0.79, "best": "ppo"},
                    "sft": {"kl_to_sft": 0.0},
                    "ppo": {"judges": {}, "win_rate": 0.79, "p_value": 0.01},
                    "dpo": {"judges": {}, "win_rate": 0.75, "p_value": None},
                },
            ),
        ]
    )
    assert found == {
        "heldout_loss": 0.35,
        "ppo": {"train_score": 1.4, "win_rate": 0.79, "p_value": 0.01},
        "dpo": {"train_score": 1.1, "win_rate": 0.75},
        "verdict": {"win_rate": 0.79},
    }


def test_the_demo_has_a_page_of_them_and_no_more(finished_project: Path) -> None:
    found = json.loads((finished_project / "reports/headline.json").read_text())
    rows = {f"{key}.{inner}" if isinstance(value, dict) else key for key, value in found.items()
            for inner in (value if isinstance(value, dict) else [""])}  # fmt: skip
    assert {"heldout_loss", "pairwise_accuracy", "ece", "ppo.win_rate", "dpo.win_rate_low"} <= rows
    assert len(rows) < 50
    metrics = read_run(finished_project, Params().candidates).metrics
    assert found["pairwise_accuracy"] == metrics["reward"]["pairwise_accuracy"]
    assert run_figures("reward", metrics["reward"]).items() <= found.items()
