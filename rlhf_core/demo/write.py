"""Writing the demo world's data files; the same seed gives the same bytes."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_core.demo.annotators import ANNOTATORS
from rlhf_core.demo.corrupt import CORRUPTIONS, corrupt
from rlhf_core.demo.gold import grade
from rlhf_core.demo.scene import Scene
from rlhf_core.demo.world import CAREFUL, DEMONSTRATIONS, SLOPPY, draw_reply, draw_scenes
from rlhf_core.state.atomic import write_text

NUM_DEMONSTRATIONS = 6600  # what fits into 3 MB beside the others
NUM_PREFERENCE_PROMPTS = 700  # the first ones of prompts.jsonl
NUM_PPO_PROMPTS = 1536  # the rest of it
NUM_REWARD_TEST_PROMPTS = 400  # the first ones of heldout_prompts.jsonl
NUM_POLICY_TEST_PROMPTS = 500  # the rest of it
NUM_VOTED_TRAIN_PAIRS = 110
NUM_VOTED_HELDOUT_PAIRS = 40

_README = """# Simulated data

Written by `python -m rlhf_core.demo --seed {seed} --out DIR`. Prompts and replies are drawn from
templates, votes come from simulated annotators, scores from the gold scorer. No person wrote or judged any of it.

| file | rows | what |
|---|---|---|
{rows}
"""
_DESCRIPTIONS = {
    "demonstrations": "replies of mixed quality, to imitate",
    "prompts": "training prompts without replies: the first 700 for preferences, the others for PPO",
    "heldout_prompts": "products and requests that no training prompt has: 400 for the reward model, 500 for policies",
    "graded": "replies of every quality to the first 400 held-out prompts, with their gold score",
    "votes": "simulated votes on pairs of replies, for `label.source: file`",
}


def write_demo_data(seed: int, folder: Path) -> dict[str, int]:
    """Write the five data files and a README into `folder`; return the number of rows of each file.

    Files: demonstrations, prompts, heldout_prompts, graded, votes, each `<name>.jsonl` with an object a line.
    Prompts of demonstrations.jsonl, prompts.jsonl and heldout_prompts.jsonl are all different.
    """
    num_prompts = NUM_PREFERENCE_PROMPTS + NUM_PPO_PROMPTS
    scenes = draw_scenes(_rng(seed, "prompts"), NUM_DEMONSTRATIONS + num_prompts, "train")
    demonstrated, prompted = scenes[:NUM_DEMONSTRATIONS], scenes[NUM_DEMONSTRATIONS:]
    heldout = draw_scenes(_rng(seed, "heldout_prompts"), NUM_REWARD_TEST_PROMPTS + NUM_POLICY_TEST_PROMPTS, "heldout")
    reward_test = heldout[:NUM_REWARD_TEST_PROMPTS]
    voted = prompted[:NUM_VOTED_TRAIN_PAIRS] + reward_test[:NUM_VOTED_HELDOUT_PAIRS]
    files: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "demonstrations": lambda: _demonstrations(_rng(seed, "demonstrations"), demonstrated),
        "prompts": lambda: _prompts("p", prompted),
        "heldout_prompts": lambda: _prompts("h", heldout),
        "graded": lambda: _graded(_rng(seed, "graded"), reward_test),
        "votes": lambda: _votes(_rng(seed, "votes"), voted),
    }
    counts = {}
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows()]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        counts[name] = len(lines)
    table = "\n".join(f"| `{name}.jsonl` | {counts[name]:,} | {_DESCRIPTIONS[name]} |" for name in files)
    write_text(folder / "README.md", _README.format(seed=seed, rows=table))
    return counts


def _rng(seed: int, purpose: str) -> random.Random:
    return random.Random(f"demo/{seed}/{purpose}")  # noqa: S311 (simulation, nothing is kept secret)


def _demonstrations(rng: random.Random, scenes: list[Scene]) -> Iterator[dict[str, Any]]:
    for number, scene in enumerate(scenes):
        yield {
            "id": f"d{number:04}",
            "prompt": scene.prompt(),
            "response": draw_reply(rng, scene, DEMONSTRATIONS),
            "task": scene.task,
        }


def _prompts(prefix: str, scenes: list[Scene]) -> Iterator[dict[str, Any]]:
    for number, scene in enumerate(scenes):
        yield {"id": f"{prefix}{number:04}", "prompt": scene.prompt(), "task": scene.task}


def _graded(rng: random.Random, scenes: list[Scene]) -> Iterator[dict[str, Any]]:
    number = 0
    for scene in scenes:
        prompt = scene.prompt()
        for response in _graded_replies(rng, scene):
            score = grade(prompt, response).gold
            yield {"id": f"g{number:04}", "prompt": prompt, "response": response, "score": round(score, 4)}
            number += 1


def _graded_replies(rng: random.Random, scene: Scene) -> list[str]:
    """Up to five different replies: a careful one, a worse copy of it, two ordinary ones and a sloppy one."""
    careful = draw_reply(rng, scene, CAREFUL)
    ordinary = [draw_reply(rng, scene) for _ in range(2)]
    worse = corrupt(rng, scene, careful, rng.choice(CORRUPTIONS))
    replies = [careful, *ordinary, draw_reply(rng, scene, SLOPPY), *([worse] if worse is not None else [])]
    replies = list(dict.fromkeys(replies))
    rng.shuffle(replies)
    return replies


def _votes(rng: random.Random, scenes: list[Scene]) -> Iterator[dict[str, Any]]:
    for number, scene in enumerate(scenes):
        prompt = scene.prompt()
        first, second = draw_reply(rng, scene), draw_reply(rng, scene)
        while second == first:
            second = draw_reply(rng, scene)
        for annotator in ANNOTATORS:
            vote = annotator.vote(rng, grade(prompt, first), grade(prompt, second))
            yield {
                "pair_id": f"v{number:03}",
                "prompt": prompt,
                "response_a": first,
                "response_b": second,
                "annotator": vote.annotator,
                "choice": vote.choice,
                "strength": vote.strength,
                "seconds": vote.seconds,
                "task": scene.task,
            }
