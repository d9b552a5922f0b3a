"""Great Expectations run over the rows of a record kind (importing the library takes 3 s).

First each row is looked at by itself, then the good ones beside each other: no bad row counts as the first of two.

Every row that an expectation did not expect is named: no `mostly`, and an expectation that could not be computed is an
error, never a pass.
"""

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read once, when the library is imported

import great_expectations as gx
import pandas as pd
from great_expectations.core.run_identifier import RunIdentifier
from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults
from great_expectations.render.renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView

from rlhf_core.config import ValidateConfig
from rlhf_core.data.reading.judgements import repeats
from rlhf_core.data.reading.kinds import SPECS, Kind
from rlhf_core.data.reading.rankings import Bound, ranking_bounds
from rlhf_core.text.normal import visible
from tasks.stages.validate.suites import (
    BESIDE,
    FORM_OF_TOOLS,
    Check,
    CheckedRow,
    beside_suite,
    suite,
    to_see,
    tools_check,
)

_FIXED_RUN = RunIdentifier(run_name="validate", run_time=datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Why a row is bad (or, for a warning, odd)."""

    code: str
    reason: str
    warning: bool


@dataclass(kw_only=True, slots=True)
class Checked:
    """Findings by the position of the row, and the Data Docs page of the result (HTML as the library makes it)."""

    findings: dict[int, list[Finding]] = field(default_factory=dict)
    page: str = ""

    def is_bad(self, position: int) -> bool:
        """Whether something was found that is no mere warning."""
        return not all(finding.warning for finding in self.findings.get(position, ()))


def check(kind: Kind, candidates: Sequence[CheckedRow], config: ValidateConfig) -> Checked:
    """Run the suites of a record kind over all its rows."""
    checked = Checked()
    result = _validate(kind, to_frame(kind, candidates, config), _checks(kind, candidates, config), candidates, checked)
    good = [position for position in range(len(candidates)) if not checked.is_bad(position)]
    found = repeats(kind, [candidates[position].record for position in good])
    for place, repeat in found.items():
        candidates[good[place]].repeat = repeat
    result = _joined(result, _validate(kind, _beside_frame(candidates), beside_suite(kind), candidates, checked))
    checked.page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result))
    return checked


def _checks(kind: Kind, candidates: Sequence[CheckedRow], config: ValidateConfig) -> Iterator[Check]:
    """The suite of a kind, and where there is a fault of tools at all, the check that names them."""
    yield from suite(kind, config)
    if any(item.record.tool_problem for item in candidates):
        yield tools_check()


def to_frame(kind: Kind, candidates: Sequence[CheckedRow], config: ValidateConfig) -> pd.DataFrame:
    """One row a candidate: its fields, what type each had, and the columns computed beside the other rows."""
    columns: dict[str, Any] = {}
    for name, spec in SPECS[kind].items():
        values = [candidate.record.values[name] for candidate in candidates]
        dtype = {"integer": "Int64", "number": "Float64"}.get(spec.type, "object")
        if spec.type not in ("responses", "ranking"):
            columns[name] = pd.Series(values, dtype=dtype)
        if spec.type in ("prompt", "response", "name"):
            columns[to_see(name)] = pd.Series([_seen(value) for value in values], dtype="Int64")
        columns[f"type of {name}"] = pd.Series([item.record.types[name] for item in candidates], dtype="object")
    if any(item.record.tool_problem for item in candidates):
        columns[FORM_OF_TOOLS] = pd.Series([item.record.tool_problem for item in candidates], dtype="object")
    columns["form"] = pd.Series([item.record.problem for item in candidates], dtype="object")
    columns["responses are the same"] = [item.same_responses for item in candidates]
    columns["transcripts part early"] = [item.record.parts_early for item in candidates]
    columns["turns alternate"] = [item.record.alternates for item in candidates]
    columns["nearly a transcript"] = [item.record.reformed for item in candidates]
    columns["turns within a turn"] = [item.record.holds_turns for item in candidates]
    if kind == "rankings":
        for bound in ranking_bounds(config.max_response_chars, empty=config.keep_empty_responses):
            columns[bound.name] = pd.Series([_measured(bound, item) for item in candidates], dtype="Int64")
    return pd.DataFrame(columns)


def _seen(text: str | None) -> int | None:
    """How many characters of a text can be seen; null where there is none."""
    return None if text is None else len(visible(text))


def _measured(bound: Bound, item: CheckedRow) -> int | None:
    """A number of a ranking; null, which every expectation lets pass, where one of its lists is of the wrong type."""
    responses, ranking = item.record.values["responses"], item.record.values["ranking"]
    return None if responses is None or ranking is None else bound.measure(responses, ranking)


def _beside_frame(candidates: Sequence[CheckedRow]) -> pd.DataFrame:
    """Of each row the line of the other one because of which it does not count, in the column of why."""

    def line(item: CheckedRow, why: str) -> int | None:
        return item.repeat.other.line if item.repeat and item.repeat.why == why else None

    lines = {column: [line(item, why) for item in candidates] for why, (_, column) in BESIDE.items()}
    return pd.DataFrame({column: pd.Series(values, dtype="Int64") for column, values in lines.items()})


def _validate(
    kind: Kind, frame: pd.DataFrame, checks: Iterable[Check], candidates: Sequence[CheckedRow], checked: Checked
) -> Any:
    """Run the checks, add what they find to `checked`, and return the library's result without values of the data."""
    by_code = {item.code: item for item in checks}
    result = _run(kind, frame, by_code.values())
    for outcome in result.results:
        item = by_code[outcome.expectation_config.meta["code"]]
        if outcome.exception_info.get("raised_exception", True):
            raise RuntimeError(f"{kind}: expectation {item.code} could not be computed: {outcome.exception_info}")
        for position in outcome.result.get("unexpected_index_list") or ():
            finding = Finding(code=item.code, reason=item.say(candidates[position]), warning=item.warning)
            checked.findings.setdefault(position, []).append(finding)
        _forget_values(outcome.result)
    return result


def _run(kind: Kind, frame: pd.DataFrame, checks: Iterable[Check]) -> Any:
    # The default context would leave a folder for its own docs site in the system's temporary directory.
    memory = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    config = DataContextConfig(store_backend_defaults=memory, analytics_enabled=False)
    context = gx.get_context(mode="ephemeral", project_config=config)
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("data").add_dataframe_asset(kind)
    batch = asset.add_batch_definition_whole_dataframe("all rows")
    expectations = gx.ExpectationSuite(name=kind)
    for item in checks:
        item.expectation.meta = {"code": item.code}
        expectations.add_expectation(item.expectation)
    definition = gx.ValidationDefinition(name=kind, data=batch, suite=context.suites.add(expectations))
    return context.validation_definitions.add(definition).run(
        batch_parameters={"dataframe": frame}, result_format="COMPLETE", run_id=_FIXED_RUN
    )


def _joined(first: Any, second: Any) -> Any:
    """Two results of one kind as one, for one page."""
    first.results.extend(second.results)
    first.success = first.success and second.success
    passed = sum(bool(outcome.success) for outcome in first.results)
    first.statistics = {
        "evaluated_expectations": len(first.results),
        "successful_expectations": passed,
        "unsuccessful_expectations": len(first.results) - passed,
        "success_percent": 100 * passed / len(first.results),
    }
    return first


def _forget_values(result: dict[str, Any]) -> None:
    """Take values of the data out of a result: Data Docs would show them as HTML, unescaped."""
    for key in [key for key in result if key.startswith(("unexpected_list", "partial_", "unexpected_index"))]:
        del result[key]
