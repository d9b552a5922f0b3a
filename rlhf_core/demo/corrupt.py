"""Copies of a reply that are worse in one known way."""

import random
from typing import Literal

from rlhf_core.demo import phrases
from rlhf_core.demo.gold import parse_reply
from rlhf_core.demo.scene import Scene
from rlhf_core.demo.world import claim, other_value

Corruption = Literal["value", "drop", "filler", "rude"]
CORRUPTIONS: tuple[Corruption, ...] = ("value", "drop", "filler", "rude")


def corrupt(rng: random.Random, scene: Scene, reply: str, kind: Corruption) -> str | None:
    """A copy with a true claim made false ("value"), a claim left out ("drop"), or filler or rudeness added.

    Returns None where the reply has no claim to change, or nothing would be left of it.
    """
    if kind in ("filler", "rude"):
        return f"{reply} {rng.choice(phrases.FILLERS if kind == 'filler' else phrases.RUDE)}".strip()
    sentences = parse_reply(reply)
    places = [
        place
        for place, sentence in enumerate(sentences)
        if sentence.kind == "claim" and (kind == "drop" or sentence.true_in(scene))
    ]
    if not places:
        return None
    texts = [sentence.text for sentence in sentences]
    place = rng.choice(places)
    if kind == "drop":
        del texts[place]
        return " ".join(texts) or None
    name = sentences[place].name
    texts[place] = claim(rng, scene.item, name, other_value(rng, name, scene.facts[name]))
    return " ".join(texts)
