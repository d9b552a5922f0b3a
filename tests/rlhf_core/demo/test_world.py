"""Scenes and replies are drawn as often, and split as strictly, as the world promises."""

import random
from collections import Counter

import pytest

from rlhf_core.demo import phrases
from rlhf_core.demo.corrupt import corrupt
from rlhf_core.demo.gold import grade, parse_reply
from rlhf_core.demo.scene import Scene, read_scene
from rlhf_core.demo.world import (
    CAREFUL,
    DEMONSTRATIONS,
    SLOPPY,
    draw_reply,
    draw_scenes,
    heldout_content,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return draw_scenes(random.Random(0), 4000, "train")


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_a_prompt_reads_back_as_its_scene(scenes: list[Scene]) -> None:
    for scene in scenes[:1000]:
        assert read_scene(scene.prompt()) == scene


def test_prompts_are_all_different_and_spare_the_taken_ones(scenes: list[Scene]) -> None:
    prompts = {scene.prompt() for scene in scenes}
    assert len(prompts) == 4000
    again = draw_scenes(random.Random(0), 500, "train", taken=prompts)
    assert not prompts & {scene.prompt() for scene in again}


def test_tasks_come_in_the_promised_shares(scenes: list[Scene]) -> None:
    counts = Counter(scene.task for scene in scenes)
    single = counts["price"] + counts["aisle"] + counts["stock"]
    assert single / 4000 == pytest.approx(0.42, abs=0.03)
    assert counts["two_facts"] / 4000 == pytest.approx(0.30, abs=0.03)
    assert counts["hours"] / 4000 == pytest.approx(0.08, abs=0.02)
    assert counts["unsafe"] / 4000 == pytest.approx(0.20, abs=0.03)
    assert share([scene.facts["stock"] == "0" for scene in scenes]) == pytest.approx(0.35, abs=0.03)


def test_the_split_is_by_content(scenes: list[Scene]) -> None:
    heldout = draw_scenes(random.Random(0), 1000, "heldout")
    assert all(heldout_content(scene) for scene in heldout)
    assert not any(heldout_content(scene) for scene in scenes)
    asked_about = {scene.product for scene in heldout if not scene.unsafe}
    assert len(asked_about) > 100
    assert not asked_about & {scene.product for scene in scenes}
    dangers = {scene.request for scene in heldout if scene.unsafe}
    assert len(dangers) > 5
    assert not dangers & {scene.request for scene in scenes if scene.unsafe}


def test_every_sentence_of_a_reply_is_known_to_the_gold_scorer(scenes: list[Scene]) -> None:
    rng = random.Random(1)
    kinds = Counter(sentence.kind for scene in scenes for sentence in parse_reply(draw_reply(rng, scene, SLOPPY)))
    assert kinds["unknown"] == 0
    assert set(kinds) == {"claim", *phrases.FIXED_SENTENCES}


def test_systematic_flaws_are_the_majority(scenes: list[Scene]) -> None:
    rng = random.Random(2)
    oversold, incomplete, complied = [], [], []
    for scene in scenes:
        sentences = parse_reply(draw_reply(rng, scene))
        claims = [sentence for sentence in sentences if sentence.kind == "claim"]
        if scene.unsafe:
            complied.append(any(sentence.kind == "compliance" for sentence in sentences))
        elif scene.task == "two_facts" and claims:
            incomplete.append(len(claims) == 1)
        elif scene.task == "stock" and scene.facts["stock"] == "0" and claims:
            oversold.append(claims[0].value in ("2", "3", "4"))
    assert share(complied) == pytest.approx(0.65, abs=0.05)
    assert share(incomplete) == pytest.approx(0.70, abs=0.05)
    assert share(oversold) == pytest.approx(0.75 + 0.25 * 0.22 * 3 / 9, abs=0.09)


def test_demonstrations_are_of_mixed_quality(scenes: list[Scene]) -> None:
    rng = random.Random(3)
    grades = [grade(scene.prompt(), draw_reply(rng, scene, DEMONSTRATIONS)) for scene in scenes]
    golds = [result.gold for result in grades]
    mean = sum(golds) / len(golds)
    assert mean == pytest.approx(0.727, abs=0.015)  # the design's figure
    assert (sum((gold - mean) ** 2 for gold in golds) / len(golds)) ** 0.5 > 0.2
    assert share([result.rude > 0 for result in grades]) == pytest.approx(0.12, abs=0.02)


def test_a_careful_reply_is_nearly_perfect_and_a_sloppy_one_is_not(scenes: list[Scene]) -> None:
    rng = random.Random(4)
    careful = [grade(scene.prompt(), draw_reply(rng, scene, CAREFUL)).gold for scene in scenes[:500]]
    sloppy = [grade(scene.prompt(), draw_reply(rng, scene, SLOPPY)).gold for scene in scenes[:500]]
    assert min(careful) > 0.85
    assert sum(sloppy) / 500 < 0.55


@pytest.mark.parametrize("kind", ["value", "drop", "filler", "rude"])
def test_a_corrupted_copy_is_worse_in_its_own_way(kind: str, scenes: list[Scene]) -> None:
    rng = random.Random(5)
    changed = 0
    for scene in scenes[:400]:
        reply = draw_reply(rng, scene, CAREFUL)
        copy = corrupt(rng, scene, reply, kind)
        if copy is None:
            continue
        changed += 1
        before, after = grade(scene.prompt(), reply), grade(scene.prompt(), copy)
        assert after.unknown == 0
        match kind:
            case "value":
                assert after.truthful < before.truthful
                assert len(parse_reply(copy)) == len(parse_reply(reply))
            case "drop":
                assert after.helpful < before.helpful
            case "filler":
                assert parse_reply(copy)[-1].kind == "filler"
            case "rude":
                assert after.harmless < before.harmless
    assert changed > 250


def test_there_is_nothing_to_corrupt_in_a_refusal(scenes: list[Scene]) -> None:
    rng = random.Random(6)
    assert corrupt(rng, scenes[0], "I am not really sure.", "value") is None
    assert corrupt(rng, scenes[0], "I am not really sure.", "drop") is None


def test_only_a_true_claim_is_made_false() -> None:
    scene = read_scene("Notes: The lamp: aisle F, price 35, stock 6.\nCustomer: How much is the lamp?\nAssistant:")
    false, true = "The lamp sells for 40 dollars.", "The lamp is in aisle F."
    for seed in range(20):
        assert corrupt(random.Random(seed), scene, false, "value") is None
        copy = corrupt(random.Random(seed), scene, f"{false} {true}", "value")
        assert copy is not None
        assert copy.startswith(false)
        assert true not in copy
