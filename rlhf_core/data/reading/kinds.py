"""The record kinds: their fields, and other names they are known by."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from rlhf_core.data.reading.fields import FieldSpec

Kind = Literal["demonstrations", "prompts", "heldout_prompts", "graded", "votes", "comparisons", "rankings"]

OVERALL = "overall"
"""What is judged where a row names no criterion: which response is better on the whole."""

UNNAMED = "file"
"""Who judged where a row names no annotator."""

_PROMPT = FieldSpec(type="prompt", aliases=("question",))
_RESPONSE = FieldSpec(type="response", aliases=("completion", "answer"))
_TASK = FieldSpec(type="name", required=False, default="")
_SOURCE = FieldSpec(type="name", required=False, default="file")
_ID = FieldSpec(type="name", required=False)
_REPLY = FieldSpec(type="response")
_CRITERION = FieldSpec(type="name", required=False, default=OVERALL)
_ANNOTATOR = FieldSpec(type="name", required=False, default=UNNAMED)
_STRENGTH = FieldSpec(type="integer", required=False, default=1)

SPECS: Mapping[Kind, Mapping[str, FieldSpec]] = MappingProxyType(
    {
        "demonstrations": {
            "id": _ID,
            "prompt": _PROMPT,
            "response": _RESPONSE,
            "task": _TASK,
            "source": _SOURCE,
        },
        "prompts": {"id": _ID, "prompt": _PROMPT, "task": _TASK},
        "heldout_prompts": {"id": _ID, "prompt": _PROMPT, "task": _TASK},
        "graded": {
            "id": _ID,
            "prompt": _PROMPT,
            "response": _RESPONSE,
            "score": FieldSpec(type="number"),
            "annotator": _ANNOTATOR,
            "criterion": _CRITERION,
        },
        "votes": {
            "pair_id": _ID,
            "prompt": _PROMPT,
            "response_a": _REPLY,
            "response_b": _REPLY,
            "annotator": FieldSpec(type="name"),
            "choice": FieldSpec(type="name"),
            "strength": _STRENGTH,
            "seconds": FieldSpec(type="number", required=False),
            "criterion": _CRITERION,
            "task": _TASK,
        },
        "comparisons": {
            "id": _ID,
            "prompt": _PROMPT,
            "chosen": _REPLY,
            "rejected": _REPLY,
            "annotator": _ANNOTATOR,
            "strength": _STRENGTH,
            "criterion": _CRITERION,
            "task": _TASK,
            "source": _SOURCE,
        },
        "rankings": {
            "id": _ID,
            "prompt": _PROMPT,
            "responses": FieldSpec(type="responses"),
            "ranking": FieldSpec(type="ranking"),
            "annotator": _ANNOTATOR,
            "criterion": _CRITERION,
            "task": _TASK,
        },
    }
)
