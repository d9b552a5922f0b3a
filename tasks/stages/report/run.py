"""Stage `report`: one HTML page of the whole run that opens without a network.

Reads the small files under artifacts/, reports/metrics/*.json, reports/plots/*.csv and the parameters; writes
report.html, with a place left for what only a run knows (time, versions, gates: `flows.run.report_band`). The page runs
no script, loads nothing, and shows model text as plain text.
"""

from typing import Any

from rlhf_core.state.atomic import write_text
from tasks.frame.stage import Stage
from tasks.stages.report.headline import headline_figures
from tasks.stages.report.html.page import render
from tasks.stages.report.html.sources import read_run


def run(stage: Stage) -> dict[str, Any]:
    """Write the page; returns the headline figures of the run, which go to `reports/headline.json`."""
    files = read_run(stage.root, stage.params.candidates)
    write_text(stage.out / "report.html", render(files, stage.params, stage.root))
    return headline_figures(files.metrics.items())
