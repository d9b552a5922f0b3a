"""The page that teaches the method: its program is taken from it and run."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[3] / "docs/teaching-loop.md").read_text()
MOST_LINES = 60


def program() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture(scope="module")
def ended() -> dict[str, Any]:
    """What the program has defined at its end."""
    names: dict[str, Any] = {}
    exec(compile(program(), "docs/teaching-loop.md", "exec"), names)
    return names


def test_it_has_sixty_lines_at_most() -> None:
    lines = [line for line in program().splitlines() if line.strip()]
    assert 40 < len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= 120


def test_each_of_its_three_parts_learns(ended: dict[str, Any]) -> None:
    """Before: ln 600 = 6.4 a token, ln 2 = 0.69 a pair, and replies like those of the demonstrations."""
    assert ended["sft_loss"] < 1.0
    assert ended["reward_loss"] < 0.69
    golds = ended["golds"]
    assert sum(golds[-5:]) / 5 > sum(golds[:5]) / 5 + 0.05


def test_what_people_prefer_scores_higher_on_prompts_it_has_not_seen(ended: dict[str, Any]) -> None:
    """`gold` and the reward model on fresh scenes: right in more than three fifths of the pairs that differ."""
    scenes = ended["draw_scenes"](ended["rng"], 60, "heldout")
    prompts = [scene.prompt() for scene in scenes]
    asked = ended["encode_prompts"](ended["tokenizer"], prompts, 160)
    right = told = 0
    for scene, prompt in zip(scenes, asked, strict=True):
        texts = [ended["draw_reply"](ended["rng"], scene) for _ in range(2)]
        golds = [ended["grade"](scene.prompt(), text).gold for text in texts]
        if golds[0] == golds[1]:
            continue
        written = ended["encode_responses"](ended["tokenizer"], texts, 56)
        scores = ended["reward"](ended["collate"]([prompt] * 2, written, ended["pad"])).tolist()
        told += 1
        right += (scores[0] > scores[1]) == (golds[0] > golds[1])
    assert told > 20
    assert right / told > 0.6
