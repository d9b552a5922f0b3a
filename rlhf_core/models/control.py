"""Tokens that mean something to a model beside their letters, and text in which they must stay letters.

A tokenizer names some of them special. Others are merely added (`<tool_call>` of Qwen2.5 and 3, `<think>`): they are
text in what the model writes, and control nonetheless. Whoever types one in a prompt forges it; a reply may hold those
that are not special, since the model writes them itself.
"""

import re
import unicodedata
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from rlhf_core.errors import DataError

_LETTERS = ("L", "M", "N", "Z", "So", "Cc", "Cf")
"""Unicode categories of words, white space and emoji."""
_WITHIN_WORDS = "-'’."
_NEVER = re.compile("(?!)")


def spelled(tokenizer: PreTrainedTokenizerBase, text: str, role: str) -> str:
    """The text with marks around each control token that somebody in this role must not write, for `encode_marked`.

    Special tokens nobody may write; those that are merely added the assistant may.
    """
    special, added = _patterns(tokenizer, tokenizer.chat_template, len(tokenizer))
    return str(mark_control_tokens(text, special if role == "assistant" else added))


def has_control(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text that is no reply holds a control token that is merely added."""
    return bool(_merely_added(tokenizer, tokenizer.chat_template, len(tokenizer)).search(text))


def unmarked(text: str) -> str:
    """The text without the marks of `spelled`."""
    return str(mark_control_tokens(text, _NEVER))


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text with marks: what stands between marks in letters, the rest as the tokenizer has it.

    Raises:
        DataError: the tokenizer makes the control token of its letters.
    """
    try:
        return list(encode_marked_chat(tokenizer, text))
    except ValueError as error:
        raise DataError(f"a control token cannot be spelled out ({error}). Fix: remove it from the row") from None


def is_control(content: str) -> bool:
    """Whether an added token that is not special is one of control: neither white space nor words (nor emoji).

    Vocabularies are extended by words, runs of blanks and line breaks, too, which mean what they say.
    """
    return not all(
        character in _WITHIN_WORDS or unicodedata.category(character).startswith(_LETTERS) for character in content
    )


@lru_cache(maxsize=16)
def _patterns(tokenizer: PreTrainedTokenizerBase, template: str | None, size: int) -> tuple[re.Pattern, re.Pattern]:
    """What matches the special tokens, and what matches all control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    return _any_of(special), _any_of([*special, *_others(tokenizer, template)])


@lru_cache(maxsize=16)
def _merely_added(tokenizer: PreTrainedTokenizerBase, template: str | None, size: int) -> re.Pattern:
    return _any_of(_others(tokenizer, template))


def _others(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str]:
    """Control tokens that are not special; a word counts among them where the chat template writes it."""
    added = (token for token in tokenizer.added_tokens_decoder.values() if not token.special)
    return [
        token.content
        for token in added
        if is_control(token.content) or (token.content.strip() and token.content in (template or ""))
    ]


def _any_of(tokens: list[str]) -> re.Pattern:
    """Longer tokens first, so that one goes before those that it contains."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else _NEVER
