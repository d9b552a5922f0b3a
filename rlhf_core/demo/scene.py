"""A scene of the demo world: the notes' facts and the customer's request, written to text and read back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from rlhf_core.demo import phrases
from rlhf_core.errors import DataError

_PROMPT = re.compile(
    r"Notes: The (?P<item>[a-z]+): aisle (?P<aisle>[A-Z]), price (?P<price>\d+), stock (?P<stock>\d+)\."
    r"(?: We close at (?P<hours>\d+) today\.)?"
    r"\nCustomer: (?P<request>[^\n]+)"
    r"\nAssistant:"
)
_UNSAFE_SENTENCES = frozenset(
    request.format(action=action) for request in phrases.UNSAFE_REQUESTS for action in phrases.UNSAFE_ACTIONS
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What a prompt says: one product, its facts, and a request.

    `facts` maps "aisle", "price", "stock" and, where the notes tell them, "hours" to the value as written.
    `asked` names the facts that the customer wants, and is empty when the request is an unsafe one.
    """

    item: str
    facts: Mapping[str, str]
    asked: tuple[str, ...]
    request: str
    greeting: str = ""

    @property
    def unsafe(self) -> bool:
        """Whether the customer asks for help with something dangerous."""
        return not self.asked

    @property
    def task(self) -> str:
        """Kind of request: the asked fact's name, "two_facts" or "unsafe"."""
        if self.unsafe:
            return "unsafe"
        return self.asked[0] if len(self.asked) == 1 else "two_facts"

    @property
    def product(self) -> str:
        """The product's identity for the split: item, aisle and price."""
        return f"{self.item}|{self.facts['aisle']}|{self.facts['price']}"

    def prompt(self) -> str:
        """The scene as the prompt that a model sees; `read_scene` is the way back."""
        notes = phrases.PRODUCT_NOTE.format(item=self.item, **self.facts)
        if "hours" in self.facts:
            notes += " " + phrases.HOURS_NOTE.format(hours=self.facts["hours"])
        return f"Notes: {notes}\nCustomer: {self.greeting}{self.request}\nAssistant:"


@lru_cache(maxsize=16_384)
def read_scene(prompt: str) -> Scene:
    """Read a prompt back into its scene.

    Raises:
        DataError: the text is not a prompt of the demo world, so nothing is known about its truth.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise _foreign(prompt)
    facts = {name: match[name] for name in ("aisle", "price", "stock", "hours") if match[name] is not None}
    request = match["request"]
    greeting = next((text for text in phrases.GREETINGS if request.startswith(text)), "")
    request = request.removeprefix(greeting)
    asked = _asked(match["item"], request)
    if asked is None:
        raise _foreign(prompt)
    return Scene(item=match["item"], facts=MappingProxyType(facts), asked=asked, request=request, greeting=greeting)


def _asked(item: str, request: str) -> tuple[str, ...] | None:
    """The facts that a request asks for, () for an unsafe one, None for a request unknown to this world."""
    if request in _UNSAFE_SENTENCES:
        return ()
    for asked, questions in phrases.QUESTIONS.items():
        if any(question.format(item=item) == request for question in questions):
            return asked
    return None


def _foreign(prompt: str) -> DataError:
    return DataError(
        f"prompt: {prompt[:80]!r} is not a prompt of the demo world, the gold scorer cannot judge it. "
        "Fix: use the gold judge and simulated annotators with simulated data only"
    )
