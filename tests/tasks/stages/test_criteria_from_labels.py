"""Comparisons and votes that name a criterion, and rankings, from data files to a trained reward model."""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.project import change_sections

from rlhf_core.data.batching.pair_table import implied_ranking
from rlhf_core.data.batching.pairs import group_pairs
from rlhf_core.data.reading.kinds import SPECS
from rlhf_core.text.tokenizer import encode_responses, load_tokenizer
from tasks.frame.definition import stage_definition
from tasks.frame.process import run_stage
from tasks.frame.stage import Progress, Stage
from tasks.params import load_params
from tasks.stages.label import run as label
from tasks.stages.policy_pairs import policy_pairs
from tasks.stages.preferences import run as preferences
from tasks.stages.reward import run as reward
from tasks.stages.validate import run as validate

TREES = Path(__file__).parents[4] / "shared/data/open-assistant/en_100_tree.jsonl.gz"
BODIES = {"validate": validate, "label": label, "preferences": preferences, "reward": reward}
WORDS = ("the lamp", "costs", "thirty", "dollars", "today", "in aisle", "seven", "for you")
RANKED = 5  # responses of a ranking: ten pairs, more than `preferences.max_pairs_per_prompt`
"""The longer a response, the better on the whole and the worse on `brief`."""


def run(project: Path, stage: str) -> dict[str, Any]:
    """Run a stage in this process and return its figures."""
    assert run_stage(stage, BODIES[stage].run, load_params(project / "params.yaml"), project) == 0
    return json.loads((project / f"reports/metrics/{stage}.json").read_text())


def table(project: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(project / f"artifacts/{name}.parquet").to_pylist()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def responses_of(number: int) -> list[str]:
    """Some responses to prompt `number`, shortest first."""
    lengths = range(1, RANKED + 1)
    return [" ".join(WORDS[(number + place) % len(WORDS)] for place in range(length)) + "." for length in lengths]


def brief_comparisons(number: int, prompt: str) -> list[dict[str, Any]]:
    short, *_, long = responses_of(number)
    return [{"prompt": prompt, "chosen": short, "rejected": long, "criterion": "brief"}]


def brief_votes(number: int, prompt: str) -> list[dict[str, Any]]:
    """Three people, one of whom has it the wrong way round."""
    short, *_, long = responses_of(number)
    shown = {"prompt": prompt, "response_a": long, "response_b": short, "criterion": "brief"}
    return [
        shown | {"annotator": name, "choice": choice} for name, choice in (("ann", "b"), ("bob", "b"), ("cem", "a"))
    ]


@pytest.mark.parametrize(("kind", "labelled"), [("comparisons", brief_comparisons), ("votes", brief_votes)])
def test_each_criterion_trains_its_own_head_and_rankings_are_read_back(
    project: Path, kind: str, labelled: Callable[[int, str], list[dict[str, Any]]]
) -> None:
    prompts = [
        row["prompt"] for name in ("prompts", "heldout_prompts") for row in read_lines(project / f"data/{name}.jsonl")
    ]
    write_lines(
        project / f"data/{kind}.jsonl", [row for place, prompt in enumerate(prompts) for row in labelled(place, prompt)]
    )
    order = [3, 0, 4, 1, 2]  # how the responses are listed, so that no rank is a place
    rankings = [
        {
            "prompt": prompt,
            "responses": [responses_of(place)[one] for one in order],
            "ranking": [RANKED - one for one in order],
        }
        for place, prompt in enumerate(prompts)
    ]
    write_lines(project / "data/rankings.jsonl", rankings)
    change_sections(
        project,
        data={"votes": None, "rankings": "data/rankings.jsonl"} | {kind: f"data/{kind}.jsonl"},
        validate={"criteria": ["overall", "brief"]},
        label={"source": "file"},
        reward={
            "head": "sum",
            "criteria": {"overall": 1.0, "brief": 0.5},
            "loss": {"name": "plackett_luce", "average": "prompt"},
            "learning_rate": 0.02,
        },
    )
    checked = run(project, "validate")["kinds"]
    assert (checked["rankings"]["rows_kept"], checked[kind]["rows_bad"]) == (len(prompts), 0)
    labels = run(project, "label")
    assert labels["num_labelled_pairs"] == 10 * len(prompts)
    assert labels["criteria"]["brief"]["num_labelled_pairs"] == len(prompts)
    kept = run(project, "preferences")
    train = table(project, "preferences/train")
    trained = {row["prompt"] for row in train}
    assert len(train) == 10 * len(trained), "the default cap of six pairs leaves rankings whole"
    assert (kept["criteria"]["brief"], kept["criteria_heldout"]["brief"]) == (len(trained), len(prompts) - len(trained))
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in train)
    brief = table(project, "preferences/other_pairs")
    assert {row["criterion"] for row in brief} == {"brief"}
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in brief)
    figures = run(project, "reward")
    assert figures["rankings"] == {"num_read": 2 * len(trained), "num_as_pairs": 0}, "a pair is a ranking of two"
    assert figures["pairwise_accuracy"] > 0.9
    assert figures["criteria"]["brief"]["pairwise_accuracy"] > 0.9, "the opposite of what `overall` wants"
    header = (project / "reports/plots/reward.csv").read_text().splitlines()[0].split(",")
    assert {"loss/ranking.overall", "loss/ranking.brief"} <= set(header)
    check_policy_pairs(project, rankings)


def check_policy_pairs(project: Path, rankings: list[dict[str, Any]]) -> None:
    """What a policy learns from are the rankings on the whole, each read back as it was given, and nothing else."""
    stage = Stage(
        stage_definition(project, "align@dpo"),
        load_params(project / "params.yaml"),
        project,
        project / "out",
        Progress(project / "p.jsonl"),
    )
    tokenizer = load_tokenizer(project / "artifacts/sft/model")
    given = {row["prompt"]: row for row in rankings}
    prompts = list(dict.fromkeys(row["prompt"] for row in table(project, "preferences/train")))
    groups = group_pairs(policy_pairs(stage, tokenizer, "train"))
    assert len(groups) == len(prompts)
    for prompt, group in zip(prompts, groups, strict=True):
        assert {label.criterion for label in group.labels} == {"overall"}
        read = implied_ranking(group.pairs)
        assert read is not None
        row = given[prompt]
        best_first = [text for _, text in sorted(zip(row["ranking"], row["responses"], strict=True))]
        assert [group.responses[place] for place in read] == encode_responses(tokenizer, best_first, 56)


def ranked_replies(node: dict[str, Any], said: str = "") -> Iterator[dict[str, Any]]:
    """The replies to every turn of a message tree that people ranked; ranks begin with 0 there."""
    speaker = {"prompter": "Human", "assistant": "Assistant"}[node["role"]]
    said += f"\n\n{speaker}: {node['text']}"
    ranked = [reply for reply in node["replies"] if reply.get("rank") is not None]
    if node["role"] == "prompter" and len(ranked) > 1:
        yield {
            "prompt": f"{said}\n\nAssistant:",
            "responses": [reply["text"] for reply in ranked],
            "ranking": [reply["rank"] + 1 for reply in ranked],
        }
    for reply in node["replies"]:
        yield from ranked_replies(reply, said)


@pytest.mark.skipif(not TREES.exists(), reason="the real data are not beside the project; none is committed")
def test_what_people_ranked_is_read_back(project: Path) -> None:
    """Two to nine replies each: 754 pairs. Ranks that begin with 0, as they do there, are refused with the cure."""
    trees = [json.loads(line) for line in gzip.decompress(TREES.read_bytes()).splitlines()]
    rankings = [row for tree in trees for row in ranked_replies(tree["prompt"])]
    named = dict.fromkeys(SPECS) | {"rankings": "data/rankings.jsonl", "heldout_share": 0.2}
    change_sections(project, data=named, label={"source": "file"})
    write_lines(project / "data/rankings.jsonl", [*rankings, rankings[0] | {"ranking": [0, 1, 2]}])
    assert run(project, "validate")["kinds"]["rankings"]["reasons"] == {"ranking.value": 1}
    labels = run(project, "label")
    assert (labels["num_labelled_pairs"], labels["tie_share"]) == (754, 0.0)
    kept = run(project, "preferences")
    assert {step: count for step, count in kept["removed"].items() if count} == {}
    pairs: dict[str, set[tuple[str, str]]] = {}
    for row in table(project, "preferences/train") + table(project, "preferences/heldout"):
        pairs.setdefault(row["prompt"], set()).add((row["chosen"], row["rejected"]))
    for row in rankings:
        best_first = [text.strip() for _, text in sorted(zip(row["ranking"], row["responses"], strict=True))]
        assert pairs[row["prompt"]] == set(combinations(best_first, 2))
