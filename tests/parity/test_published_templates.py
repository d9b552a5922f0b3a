"""Published chat templates, as TRL 1.16 ships them, by our encoding and by transformers' with its own masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.templates import PLAIN, TOOLS, WITH_TOOLS
from support.tokenizer import byte_level
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from rlhf_core.data.batching.examples import Example, encode_dialogues
from rlhf_core.text.chat import fix_template
from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.transcripts import parse_messages, replies_of

trl = pytest.importorskip("trl", reason="needs the extra `parity`: pip install -e '.[parity]'")
pytestmark = pytest.mark.parity

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = (
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|begin_of_text|>",
)
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def published(name: str) -> PreTrainedTokenizerBase:
    """A small tokenizer with a published template and its control tokens."""
    tokenizer = byte_level((TEMPLATES / f"{name}.jinja").read_text())
    tokenizer.bos_token = "<|begin|>"
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    fix_template(tokenizer, name)
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]]
) -> list[Example]:
    """The rows of a dialogue, of which nothing may be lost."""
    dialogue, counts = parse_messages(messages, tools), TextCounts()
    turns = replies_of(dialogue.prompt, dialogue.response)
    (examples,) = encode_dialogues(
        tokenizer, [turns], [""], max_prompt_tokens=10_000, max_response_tokens=10_000, counts=counts
    )
    assert (counts.prompts_rewritten, counts.responses_rewritten) == (0, 0)
    return examples


@pytest.mark.parametrize(
    ("name", "tools"),
    [
        ("qwen2_5_training", False),
        ("qwen2_5_training", True),
        ("qwen3_training", False),
        ("qwen3_training", True),
        ("gemma3_training", False),
        ("llama3_training", False),
        ("phi3_training", False),
        ("phi3_5_training", False),
    ],
)
def test_the_mask_is_that_of_the_templates_tags_but_for_line_ends_around_replies(name: str, tools: bool) -> None:
    """Their tags enclose the line end after the end token, Qwen 2.5's the one before a reply: nobody writes these."""
    tokenizer, messages = published(name), WITH_TOOLS if tools else PLAIN
    given = TOOLS if tools else []
    (example,) = encode(tokenizer, messages, given)
    theirs = tokenizer.apply_chat_template(
        messages, tools=given or None, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = [*example.prompt, *example.response]
    mask = [0] * len(example.prompt) + (example.mask or [])
    assert ours == theirs["input_ids"][: len(ours)]
    differ = [
        (token, bit, other)
        for token, bit, other in zip(ours, mask, theirs["assistant_masks"], strict=False)
        if bit != other
    ]
    assert all(tokenizer.decode([token]) == "\n" and other == 1 for token, _, other in differ)
    assert sum(mask) > 10


@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2"])
def test_the_last_row_of_a_dialogue_with_tools_is_what_transformers_writes(name: str) -> None:
    tokenizer = published(name)
    last = encode(tokenizer, WITH_TOOLS, TOOLS)[-1]
    theirs = tokenizer.apply_chat_template(WITH_TOOLS, tools=TOOLS, return_dict=True)["input_ids"]
    ours = [*last.prompt, *last.response]
    assert ours == theirs[: len(ours)]
    assert tokenizer.decode(theirs[len(ours) :]).strip() == ""
    bits = last.mask or [1] * len(last.response)
    learned = tokenizer.decode([token for token, bit in zip(last.response, bits, strict=True) if bit])
    assert "3 of them." in learned
    assert "left" not in learned, "what the tool answered"
