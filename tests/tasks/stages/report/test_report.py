"""The report page: self-contained, escaped, the same bytes each time, honest, whole when parts are missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_core.config import AlignConfig, EvaluateConfig, LabelConfig, Params
from rlhf_core.evaluation.calibration import calibration_bins
from rlhf_core.state.atomic import digest_of, tree_digest
from tasks.stages.report.html.distributions import Series, calibration_plot, grade_plot, histogram, line_chart
from tasks.stages.report.html.page import render
from tasks.stages.report.html.sources import read_run
from tasks.stages.report.html.svg import Scale, nice_ticks, number, tag, tick_label
from tasks.stages.report.html.words import p_text, verdict_sentence, visible

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></article><svg/onload=alert(1)>",
    "</style><iframe src=javascript:alert(1)>",
    '"><a href="javascript:alert(1)" style="position:fixed">x</a>',
    "{{ 7 * 7 }}{% include 'style.css' %}",
    "![x](https://example.com/leak.png)",
    "<meta http-equiv=refresh content='0;url=https://example.com'>",
    "a\u202eb\u200bc\x1b[31md\x00e",
)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects elements, attributes and text, and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def page_of(root: Path, params: Params) -> str:
    return render(read_run(root, params.align.algorithms), params, root)


def words_of(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())


def test_the_page_is_well_formed_and_shows_every_part(make_run):
    params = Params()
    page = Page(page_of(make_run(params), params))
    assert page.open == []
    ids = {attributes.get("id") for name, attributes in page.elements if name == "section"}
    assert ids == {"ab", "reward", "curves", "data", "samples", "figures", "lineage"}
    links = {attributes["href"] for name, attributes in page.elements if name == "a"}
    assert links == {f"#{name}" for name in ids}
    assert sum(name == "svg" for name, _ in page.elements) >= 12
    assert all(attributes.get("aria-label") for name, attributes in page.elements if name == "svg")


def test_nothing_is_fetched_and_nothing_runs(make_run):
    params = Params()
    page = Page(page_of(make_run(params), params))
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img", "iframe", "link", "object", "embed", "form", "video", "audio", "base", "use"}
    for name, attributes in page.elements:
        assert not {"src", "srcset", "xlink:href", "action", "style"} & attributes.keys(), name
        assert not any(key.startswith("on") for key in attributes), name
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_style_fetches_nothing(make_run):
    params = Params()
    style = re.search(r"<style>(.*?)</style>", page_of(make_run(params), params), re.DOTALL)
    assert style is not None
    assert not re.search(r"@import|url\(|https?:", style.group(1))


def test_model_text_stays_text(make_run):
    params = Params()
    plain, hostile = Params(), page_of(make_run(params, texts=PAYLOADS), params)
    page, shown = Page(hostile), words_of(hostile)
    allowed = {name for name, _ in Page(page_of(make_run(plain), plain)).elements}
    assert {name for name, _ in page.elements} == allowed
    for payload in PAYLOADS[:-1]:
        assert payload in shown
    assert "a⟨U+202E⟩b⟨U+200B⟩c⟨U+001B⟩[31md⟨U+0000⟩e" in shown
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def test_the_same_run_gives_the_same_bytes(make_run):
    params = Params()
    root = make_run(params)
    assert page_of(root, params) == page_of(root, params)


def test_the_page_names_no_place_or_time(make_run):
    params = Params()
    root = make_run(params)
    html = page_of(root, params)
    assert str(root) not in html
    assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", html)


def test_simulated_is_said_wherever_it_matters(make_run):
    params = Params()
    shown = words_of(page_of(make_run(params), params))
    assert "Simulated data. In this run preferences come from simulated annotators" in shown
    assert "No person judged anything on this page." in shown
    assert "Judge: gold scorer (simulated)" in shown
    assert "Who labelled (simulated annotators)" in shown
    assert shown.count("gold scorer (simulated)") >= 3


def test_a_run_on_peoples_votes_is_not_called_simulated(make_run):
    params = Params(
        label=LabelConfig(source="file"),
        align=AlignConfig(algorithms=("dpo",)),
        evaluate=EvaluateConfig(judges=("reward_model",), temperatures=(1.0,)),
    )
    html = page_of(make_run(params, graded=False), params)
    shown = words_of(html)
    assert not re.search(r"Simulated data|simulated annotators|gold scorer", shown)
    assert "verdict.simulated no" in shown
    assert "PPO" not in shown
    assert "DPO beats the SFT model" in shown
    assert re.search(r"Undefined here:.* spearman \(no graded responses\)", shown)
    assert "DPO drift" in shown


def test_missing_stages_leave_their_sections_out(make_run):
    params = Params()
    root = make_run(params)
    for name in (
        "reports/metrics/evaluate.json",
        "artifacts/evaluate/samples.json",
        "artifacts/preferences/funnel.json",
    ):
        (root / name).unlink()
    for name in ("heldout_scores.parquet", "graded_scores.parquet", "calibration.json"):
        (root / "artifacts/reward" / name).unlink()
    page = Page(page_of(root, params))
    ids = {attributes.get("id") for name, attributes in page.elements if name == "section"}
    assert ids == {"reward", "curves", "data", "figures", "lineage"}
    assert "No comparison with the SFT model in this run." in " ".join(page.text)
    assert "No held-out pairs were scored in this run." in " ".join(page.text)


def test_lineage_digests_are_those_of_the_files(make_run):
    params = Params()
    root = make_run(params)
    html = page_of(root, params)
    for folder in ("artifacts/reward", "artifacts/evaluate", "artifacts/align/ppo"):
        files = tree_digest(root / folder)
        assert f'title="{digest_of(files)}"' in html
        assert all(digest in html for digest in files.values())
    (root / "artifacts/sft/model/config.json").write_text("{ }")
    assert page_of(root, params) != html


def test_models_stand_in_the_order_of_the_parameters(make_run):
    params = Params(align=AlignConfig(algorithms=("dpo", "ppo")))
    html = page_of(make_run(params), params)
    assert re.findall(r"<h3 class=\"who\">(\w+)</h3>", html)[:3] == ["SFT", "DPO", "PPO"]
    assert html.index("gold scorer (simulated), temperature 1<") < html.index("gold scorer (simulated), greedy<")


def test_the_funnel_says_what_went_and_why(make_run):
    params = Params()
    shown = words_of(page_of(make_run(params), params))
    assert "labelled pairs 6,100" in shown.replace("100.0% left ", "")
    assert re.search(r"near duplicates .*?5,702 148 because of near_duplicates", shown)
    assert re.search(r"→ heldout .*?2,200 on 400 prompts", shown)
    assert "on the criterion" not in shown


def test_the_funnel_shows_pairs_on_other_criteria(make_run):
    params = Params()
    root = make_run(params)
    path = root / "reports/metrics/preferences.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"criteria": {"harmless": 43, PAYLOADS[0]: 2}}))
    html = page_of(root, params)
    assert re.search(r"→ train [^→]*?43 pairs on the criterion harmless, beside those above", words_of(html))
    assert PAYLOADS[0] not in html


def test_every_figure_and_parameter_is_there(make_run):
    params = Params()
    shown = words_of(page_of(make_run(params), params))
    for name in ("judges.gold.T=1.win_rate", "pairwise_accuracy_low", "rows.demonstrations", "ppo.kl_coef", "seed"):
        assert name in shown


@pytest.mark.parametrize(
    ("low", "high", "finding"),
    [(0.55, 0.7, "PPO beats"), (0.45, 0.6, "PPO cannot be told from"), (0.2, 0.4, "the best, PPO, loses")],
)
def test_the_verdict_claims_no_more_than_its_interval(low: float, high: float, finding: str):
    figures = {"best": "ppo", "win_rate": (low + high) / 2, "win_rate_low": low, "win_rate_high": high}
    assert finding in verdict_sentence(figures | {"num_prompts": 500, "p_value": 0.2})


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0412, "0.041"), (1.0, "1.000"), (3.2e-27, "3×10⁻²⁷"), (0.0, "<10⁻³⁰⁰")]
)
def test_p_values(value: float | None, text: str):
    assert p_text(value) == text


def test_visible_keeps_what_people_write():
    assert visible("naïve – 日本語\n\ttab 👩‍🚀") == "naïve – 日本語\n\ttab 👩‍🚀"


def test_svg_escapes_text_and_attributes():
    drawn = tag("text", '<b>"&', class_='a" onload="x', text_anchor=None)
    assert drawn == '<text class="a&#34; onload=&#34;x">&lt;b&gt;&#34;&amp;</text>'
    assert number(-0.001) == "0"
    assert number(1 / 3) == "0.33"


def test_ticks_are_round_and_inside():
    assert nice_ticks(0.0, 1.0, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(-3.7, 3.9, 4) == [-2.0, 0.0, 2.0]
    assert nice_ticks(5.0, 5.0) == [5.0]
    assert [tick_label(value, 0.05) for value in (0.0, 0.05, 1.0)] == ["0", "0.05", "1.00"]
    assert tick_label(12000.0, 1000.0) == "12,000"


def test_a_steep_positive_curve_gets_a_log_axis_and_says_so():
    steep = line_chart("loss", [Series("train", "c-main", [(step, 8 / step) for step in range(1, 90)])])
    assert "loss, log axis" in steep
    assert steep.count("<polyline") == 2
    flat = line_chart("loss", [Series("train", "c-main", [(step, 1 + step / 90) for step in range(1, 40)])])
    assert "log axis" not in flat
    assert flat.count("<polyline") == 1


def test_a_log_scale_maps_ratios_to_equal_steps():
    scale = Scale(1.0, 100.0, 0.0, 200.0, logarithmic=True)
    assert [scale(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([0.0, 100.0, 200.0])
    assert scale.ticks(4) == [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]


def test_constant_figures_can_be_drawn():
    drawn = line_chart("flat", [Series("one", "c-main", [(1.0, 3.0)])])
    drawn += histogram("same", {"chosen": ("c-chosen", [1.0, 1.0]), "rejected": ("c-rejected", [1.0])})
    drawn += grade_plot([0.5, 0.5], [1.0, 1.0])
    drawn += calibration_plot(calibration_bins([0.0]), None)
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_candidates_against_each_other_tasks_length_and_refusals_are_shown(make_run):
    params = Params()
    root = make_run(params)
    path = root / "reports/metrics/evaluate.json"
    metrics = json.loads(path.read_text())
    one = {"wins": 30, "ties": 5, "losses": 5, "num_prompts": 40, "win_rate": 0.8125, "win_rate_low": 0.7,
           "win_rate_high": 0.9, "p_value": 0.5}  # fmt: skip
    few = one | {"wins": 1, "ties": 1, "losses": 0, "num_prompts": 2, "win_rate": 0.75, "win_rate_low": None,
                 "win_rate_high": None}  # fmt: skip
    labels = [f"T={temperature:g}" for temperature in params.evaluate.temperatures]
    metrics["head_to_head"] = {
        "ppo_against_dpo": {judge: dict.fromkeys(labels, one) for judge in params.evaluate.judges}
    }
    for name in ("ppo", "dpo"):
        metrics[name] |= {"tasks": {"shop<b>": one, "unsafe": few}}
    length = {"tokens_gain": 4.5, "tokens_gain_low": 3.1, "tokens_gain_high": 5.9, "tokens_ratio": 1.26}
    metrics["ppo"] |= length | {"over_refusal_gain": 0.012, "over_refusal_gain_low": -0.01,
                                "over_refusal_gain_high": 0.034}  # fmt: skip
    metrics["dpo"] |= length | {"tokens_gain_low": -0.5}
    path.write_text(json.dumps(metrics))
    html = page_of(root, params)
    shown = words_of(html)
    assert "PPO: replies are 26% longer than SFT's (+4.5 tokens a reply [+3.1, +5.9])." in shown
    assert "DPO: replies are not shown to be longer or shorter than SFT's" in shown
    assert "PPO: over-refusal +1.2 points from SFT's [-1.0, +3.4]." in shown
    assert shown.count("PPO against DPO") >= len(labels) * len(params.evaluate.judges)
    assert "0.812 [0.700, 0.900] 30 / 5 / 5 0.500" in shown
    assert "shop<b> PPO 40 0.812 [0.700, 0.900]" in shown
    assert "unsafe PPO 2 0.750 (too few for an interval) 1 / 1 / 0" in shown
