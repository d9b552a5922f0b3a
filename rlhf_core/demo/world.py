"""Drawing prompts and replies of the demo world from a random generator.

Replies carry two sorts of flaws. Systematic ones hold in most replies of their kind (a sold-out product said
to be in stock, one of two asked facts left out, an unsafe request answered): a model that imitates them shows
them under greedy decoding too, so there is something to align. The others are rare and random.
"""

import hashlib
import random
from collections.abc import Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from rlhf_core.demo import phrases
from rlhf_core.demo.scene import Scene

Split = Literal["train", "heldout"]

_REQUEST_WEIGHTS = {"one": 42, "two": 30, "hours": 8, "unsafe": 20}  # per cent of prompts
_SOLD_OUT_SHARE = 0.35
_HOURS_NOTE_SHARE = 0.25  # of the prompts that do not ask for them
_GREETING_SHARE = 0.5
_HELDOUT_ONE_IN = 8  # products, and pairs of unsafe action and wording


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """How often a reply has a flaw or a habit; every field is a probability."""

    oversell: float = 0.75  # a sold-out product is said to have 2 to 4 left
    incomplete: float = 0.70  # only one of two asked facts is given
    comply: float = 0.65  # an unsafe request is answered
    wrong: float = 0.22  # a stated value is not the one of the notes
    hedge: float = 0.06  # no fact at all, only doubt
    overrefuse: float = 0.03  # a harmless question is refused
    rude: float = 0.12
    opener: float = 0.35
    closer: float = 0.30
    filler: float = 0.20  # tried twice, so up to two sentences
    safe_advice: float = 0.40  # added to a refusal


DEMONSTRATIONS = Mix()
# fmt: off
CAREFUL = Mix(
    oversell=0.0, incomplete=0.0, comply=0.0, wrong=0.0, hedge=0.0, overrefuse=0.0,
    rude=0.0, opener=0.6, filler=0.0,
)
SLOPPY = Mix(
    oversell=0.9, incomplete=0.8, comply=0.9, wrong=0.6, hedge=0.15, overrefuse=0.1,
    rude=0.4, opener=0.2, filler=0.5,
)
# fmt: on


def draw_scenes(rng: random.Random, count: int, split: Split, taken: Set[str] = frozenset()) -> list[Scene]:
    """`count` scenes of one split whose prompts differ from each other and from those in `taken`."""
    seen = set(taken)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = _draw_scene(rng)
        prompt = scene.prompt()
        if _fits(scene, split) and prompt not in seen:
            seen.add(prompt)
            scenes.append(scene)
    return scenes


def heldout_content(scene: Scene) -> bool:
    """Whether what the request is about (product, or unsafe action in this wording) is kept from training."""
    return _in_heldout(scene.request if scene.unsafe else scene.product)


def _fits(scene: Scene, split: Split) -> bool:
    """Training scenes also never mention a held-out product in their notes, whatever they ask."""
    if split == "heldout":
        return heldout_content(scene)
    return not heldout_content(scene) and not _in_heldout(scene.product)


def _in_heldout(content: str) -> bool:
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) % _HELDOUT_ONE_IN == 0


def _draw_scene(rng: random.Random) -> Scene:
    kind = rng.choices(list(_REQUEST_WEIGHTS), list(_REQUEST_WEIGHTS.values()))[0]
    item = rng.choice(phrases.ITEMS)
    facts = {name: rng.choice(phrases.VALUES[name]) for name in ("aisle", "price", "stock")}
    if rng.random() < _SOLD_OUT_SHARE:
        facts["stock"] = phrases.SOLD_OUT
    if kind == "hours" or rng.random() < _HOURS_NOTE_SHARE:
        facts["hours"] = rng.choice(phrases.VALUES["hours"])
    asked: tuple[str, ...] = ()
    if kind == "unsafe":
        request = rng.choice(phrases.UNSAFE_REQUESTS).format(action=rng.choice(phrases.UNSAFE_ACTIONS))
    else:
        asked = rng.choice([names for names in phrases.QUESTIONS if _question_kind(names) == kind])
        request = rng.choice(phrases.QUESTIONS[asked]).format(item=item)
    greeting = rng.choice(phrases.GREETINGS) if rng.random() < _GREETING_SHARE else ""
    return Scene(item=item, facts=MappingProxyType(facts), asked=asked, request=request, greeting=greeting)


def _question_kind(asked: tuple[str, ...]) -> str:
    if asked == ("hours",):
        return "hours"
    return "one" if len(asked) == 1 else "two"


def draw_reply(rng: random.Random, scene: Scene, mix: Mix = DEMONSTRATIONS) -> str:
    """A reply to a scene with flaws as often as `mix` says."""
    rude = rng.random() < mix.rude
    rude_first = rude and rng.random() < 0.5
    sentences: list[str] = []
    if rude_first:
        sentences.append(rng.choice(phrases.RUDE))
    elif not rude and rng.random() < mix.opener:
        sentences.append(rng.choice(phrases.OPENERS))
    sentences += _unsafe_core(rng, mix) if scene.unsafe else _factual_core(rng, scene, mix)
    for _ in range(2):
        if rng.random() < mix.filler:
            sentences.append(rng.choice(phrases.FILLERS))
    if rude and not rude_first:
        sentences.append(rng.choice(phrases.RUDE))
    elif rng.random() < mix.closer:
        sentences.append(rng.choice(phrases.CLOSERS))
    return " ".join(sentences)


def _unsafe_core(rng: random.Random, mix: Mix) -> list[str]:
    if rng.random() < mix.comply:
        return [rng.choice(phrases.COMPLIANCE)]
    advice = [rng.choice(phrases.SAFE_ADVICE)] if rng.random() < mix.safe_advice else []
    return [rng.choice(phrases.REFUSALS), *advice]


def _factual_core(rng: random.Random, scene: Scene, mix: Mix) -> list[str]:
    if rng.random() < mix.overrefuse:
        return [rng.choice(phrases.REFUSALS)]
    if rng.random() < mix.hedge:
        return [rng.choice(phrases.HEDGES)]
    asked = scene.asked
    if len(asked) == 2 and rng.random() < mix.incomplete:
        asked = (rng.choice(asked),)
    return [_flawed_claim(rng, scene, name, mix) for name in asked]


def _flawed_claim(rng: random.Random, scene: Scene, name: str, mix: Mix) -> str:
    value = scene.facts[name]
    if name == "stock" and value == phrases.SOLD_OUT and rng.random() < mix.oversell:
        return claim(rng, scene.item, name, str(rng.randint(2, 4)))
    if rng.random() < mix.wrong:
        value = other_value(rng, name, value)
    return claim(rng, scene.item, name, value)


def other_value(rng: random.Random, name: str, value: str) -> str:
    """A value that the fact could have but has not."""
    return rng.choice([candidate for candidate in phrases.VALUES[name] if candidate != value])


def claim(rng: random.Random, item: str, name: str, value: str) -> str:
    """A sentence that states a fact of an item, in one of its wordings."""
    key = "sold_out" if name == "stock" and value == phrases.SOLD_OUT else name
    return rng.choice(phrases.CLAIMS[key]).format(item=item, value=value)
