"""Great Expectations suites, one for each record kind: the only module that imports the library (3 s).

A suite says what a good row is. Every expectation carries a code, and every row that it did not expect is named:
no `mostly`, and an expectation that could not be computed is an error, never a pass.
"""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read once, when the library is imported

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd
from great_expectations.core.run_identifier import RunIdentifier
from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults
from great_expectations.render.renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView

from rlhf_core.config import ValidateConfig
from rlhf_core.data.fields import RIGHT_TYPE
from rlhf_core.data.rankings import Bound, ranking_bounds
from rlhf_core.data.records import SPECS, Kind, Record

NAME_LENGTH = 200
ANNOTATOR = r"^[\w.@:+-]{1,64}\Z"
CHOICES = ["a", "b", "tie"]
STRENGTH = (1, 5)
_WANTED = {
    "prompt": "text",
    "response": "text",
    "responses": "an array of texts",
    "ranking": "an array of whole numbers",
    "name": "text",
    "integer": "a whole number",
    "number": "a number",
}
_SAME: Mapping[Kind, str] = {
    "comparisons": "chosen equals rejected",
    "votes": "response_a equals response_b",
    "rankings": "responses: two are equal",
}
_FIXED_RUN = RunIdentifier(run_name="validate", run_time=datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))


@dataclass(kw_only=True, slots=True)
class Candidate:
    """A record with what is known of it only beside the other rows of its kind."""

    record: Record
    same_responses: bool = False
    duplicate_of: int | None = None  # line of the earlier row that is the same item
    id_taken_at: int | None = None  # line of the earlier row that has this id


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """An expectation, the code that its failures are counted under, and words for one row that fails it."""

    code: str
    expectation: gxe.Expectation
    say: Callable[[Candidate], str]
    warning: bool = False


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


def check(kind: Kind, candidates: Sequence[Candidate], config: ValidateConfig) -> Checked:
    """Run the suite of a record kind over all its rows."""
    checks = {item.code: item for item in suite(kind, config)}
    result = _validate(kind, to_frame(kind, candidates, config), checks)
    checked = Checked()
    for outcome in result.results:
        item = checks[outcome.expectation_config.meta["code"]]
        if outcome.exception_info.get("raised_exception", True):
            raise RuntimeError(f"{kind}: expectation {item.code} could not be computed: {outcome.exception_info}")
        for position in outcome.result.get("unexpected_index_list") or ():
            finding = Finding(code=item.code, reason=item.say(candidates[position]), warning=item.warning)
            checked.findings.setdefault(position, []).append(finding)
        _forget_values(outcome.result)
    checked.page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result))
    return checked


def to_frame(kind: Kind, candidates: Sequence[Candidate], config: ValidateConfig) -> pd.DataFrame:
    """One row a candidate: its fields, what type each had, and the columns computed beside the other rows."""
    columns: dict[str, Any] = {}
    for name, spec in SPECS[kind].items():
        values = [candidate.record.values[name] for candidate in candidates]
        dtype = {"integer": "Int64", "number": "Float64"}.get(spec.type, "object")
        if spec.type not in ("responses", "ranking"):
            columns[name] = pd.Series(values, dtype=dtype)
        columns[f"type of {name}"] = pd.Series([item.record.types[name] for item in candidates], dtype="object")
    columns["form"] = pd.Series([item.record.problem for item in candidates], dtype="object")
    columns["duplicate of line"] = pd.Series([item.duplicate_of for item in candidates], dtype="Int64")
    columns["id taken at line"] = pd.Series([item.id_taken_at for item in candidates], dtype="Int64")
    columns["responses are the same"] = [item.same_responses for item in candidates]
    columns["transcripts part early"] = [item.record.parts_early for item in candidates]
    columns["turns alternate"] = [item.record.alternates for item in candidates]
    if kind == "rankings":
        for bound in ranking_bounds(config.max_response_chars):
            columns[bound.name] = pd.Series([_measured(bound, item) for item in candidates], dtype="Int64")
    return pd.DataFrame(columns)


def _measured(bound: Bound, item: Candidate) -> int | None:
    """A number of a ranking; null, which every expectation lets pass, where one of its lists is of the wrong type."""
    responses, ranking = item.record.values["responses"], item.record.values["ranking"]
    return None if responses is None or ranking is None else bound.measure(responses, ranking)


def suite(kind: Kind, config: ValidateConfig) -> Iterator[Check]:
    """The checks of a record kind."""
    yield Check(
        code="row.form",
        expectation=gxe.ExpectColumnValuesToBeNull(column="form"),
        say=lambda item: item.record.problem or "",
    )
    yield Check(
        code="row.duplicate",
        expectation=gxe.ExpectColumnValuesToBeNull(column="duplicate of line"),
        say=lambda item: f"the same item stands at line {item.duplicate_of}",
    )
    yield Check(
        code="id.taken",
        expectation=gxe.ExpectColumnValuesToBeNull(column="id taken at line"),
        say=lambda item: f"id: line {item.id_taken_at} has the same one and says something else",
    )
    for name in SPECS[kind]:
        yield from _field_checks(kind, name, config)
    if kind in _SAME:
        yield Check(
            code="responses.same",
            expectation=gxe.ExpectColumnValuesToBeInSet(column="responses are the same", value_set=[False]),
            say=lambda _: f"{_SAME[kind]} but for case, white space or Unicode form",
        )
    if kind == "rankings":
        yield from map(_ranking_check, ranking_bounds(config.max_response_chars))
    if kind == "comparisons":
        yield Check(
            code="transcripts.part_early",
            expectation=gxe.ExpectColumnValuesToBeInSet(column="transcripts part early", value_set=[False]),
            say=lambda _: "chosen and rejected differ before the last turn, so they answer different prompts",
        )
    if kind in ("comparisons", "demonstrations"):
        yield Check(
            code="turns.alternate",
            expectation=gxe.ExpectColumnValuesToBeInSet(column="turns alternate", value_set=[True], severity="warning"),
            say=lambda _: "somebody speaks twice in a row, or the human does not speak first",
            warning=True,
        )


def _field_checks(kind: Kind, name: str, config: ValidateConfig) -> Iterator[Check]:
    spec = SPECS[kind][name]
    yield Check(
        code=f"{name}.type",
        expectation=gxe.ExpectColumnValuesToBeInSet(column=f"type of {name}", value_set=[RIGHT_TYPE]),
        say=lambda item: f"{name}: is {item.record.types[name]}, must be {_WANTED[spec.type]}",
    )
    if spec.type == "prompt":
        yield from _text_checks(name, config.max_prompt_chars)
    elif spec.type == "response":
        yield from _text_checks(name, config.max_response_chars)
    elif spec.type == "name" and name not in ("task", "source"):
        yield _length_check(name, "empty", "is empty", min_value=1)
    if spec.type == "name":
        yield _length_check(name, "long", f"is longer than {NAME_LENGTH} characters", max_value=NAME_LENGTH)
    yield from _value_checks(name, config)


def _ranking_check(bound: Bound) -> Check:
    def say(item: Candidate) -> str:
        return bound.say(item.record.values["responses"], item.record.values["ranking"])

    between = gxe.ExpectColumnValuesToBeBetween(column=bound.name, min_value=bound.least, max_value=bound.most)
    return Check(code=bound.code, expectation=between, say=say)


def _text_checks(name: str, longest: int) -> Iterator[Check]:
    yield Check(
        code=f"{name}.empty",
        expectation=gxe.ExpectColumnValuesToMatchRegex(column=name, regex=r"\S"),
        say=lambda _: f"{name}: is empty",
    )
    yield _length_check(name, "long", f"is longer than {longest} characters", max_value=longest)


def _length_check(name: str, code: str, words: str, **bounds: int) -> Check:
    expectation = gxe.ExpectColumnValueLengthsToBeBetween(column=name, **bounds)
    return Check(code=f"{name}.{code}", expectation=expectation, say=lambda _: f"{name}: {words}")


def _value_checks(name: str, config: ValidateConfig) -> Iterator[Check]:
    """What only certain fields may hold."""
    between = partial(gxe.ExpectColumnValuesToBeBetween, column=name)
    one_of = partial(gxe.ExpectColumnValuesToBeInSet, column=name)
    match name:
        case "choice":
            yield _value_check(name, one_of(value_set=CHOICES), f"must be one of {', '.join(CHOICES)}")
        case "annotator":
            form = gxe.ExpectColumnValuesToMatchRegex(column=name, regex=ANNOTATOR)
            yield _value_check(name, form, "must be 1 to 64 letters, digits or . @ : + - _")
        case "strength":
            yield _value_check(name, between(min_value=STRENGTH[0], max_value=STRENGTH[1]), "must be from 1 to 5")
        case "seconds":
            yield _value_check(name, between(min_value=0), "must not be negative")
        case "criterion":
            known = list(config.criteria)
            words = f"must be one of {', '.join(known)}, or be named in validate.criteria"
            yield _value_check(name, one_of(value_set=known), words)
        case "score" if config.score_range:
            low, high = config.score_range
            yield _value_check(name, between(min_value=low, max_value=high), f"must be from {low} to {high}")


def _value_check(name: str, expectation: gxe.Expectation, words: str) -> Check:
    return Check(
        code=f"{name}.value",
        expectation=expectation,
        say=lambda item: f"{name}: is {str(item.record.values[name])[:40]!r}, {words}",
    )


def _validate(kind: Kind, frame: pd.DataFrame, checks: dict[str, Check]) -> Any:
    # The default context would leave a folder for its own docs site in the system's temporary directory.
    memory = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    config = DataContextConfig(store_backend_defaults=memory, analytics_enabled=False)
    context = gx.get_context(mode="ephemeral", project_config=config)
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("data").add_dataframe_asset(kind)
    batch = asset.add_batch_definition_whole_dataframe("all rows")
    expectations = gx.ExpectationSuite(name=kind)
    for item in checks.values():
        item.expectation.meta = {"code": item.code}
        expectations.add_expectation(item.expectation)
    definition = gx.ValidationDefinition(name=kind, data=batch, suite=context.suites.add(expectations))
    return context.validation_definitions.add(definition).run(
        batch_parameters={"dataframe": frame}, result_format="COMPLETE", run_id=_FIXED_RUN
    )


def _forget_values(result: dict[str, Any]) -> None:
    """Take values of the data out of a result: Data Docs would show them as HTML, unescaped."""
    for key in [key for key in result if key.startswith(("unexpected_list", "partial_", "unexpected_index"))]:
        del result[key]
