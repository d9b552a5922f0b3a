"""Tokens that mean something to a model beside their letters, and text in which they must stay letters.

A tokenizer names some of them special. Others are merely added (`<tool_call>` of Qwen2.5 and 3, `<think>`): they are
text in what the model writes, and control nonetheless. Whoever types one in a prompt forges it; a reply may hold those
that are not special, since the model writes them itself.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from rlhf_core.text.encoded import Encoded

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


def without_control(tokenizer: PreTrainedTokenizerBase, text: str, role: str) -> str:
    """The text without each control token that somebody in this role must not write, nor one made of what is left."""
    special, added = _patterns(tokenizer, tokenizer.chat_template, len(tokenizer))
    pattern = special if role == "assistant" else added
    while pattern.search(text):
        text = pattern.sub("", text)
    return text


def as_letters(tokenizer: PreTrainedTokenizerBase, ids: list[int], role: str) -> Encoded:
    """Tokens of a text without those of control that the tokenizer makes of letters; the text then is not whole.

    A tokenizer by longest or likeliest pieces (Unigram, WordPiece) knows `</s>` as one piece of any text, and one that
    normalises letters can make it of others. Unknown text is not whole either, and its tokens stay.

    Args:
        role: see `spelled`.
    """
    special, control = _control_ids(tokenizer, tokenizer.chat_template, len(tokenizer))
    forbidden = special if role == "assistant" else control
    unknown = _unknown_id(tokenizer)
    if forbidden.isdisjoint(ids) and unknown not in ids:
        return Encoded(ids)
    return Encoded([token for token in ids if token == unknown or token not in forbidden], is_whole=False)


def has_unknown(tokenizer: PreTrainedTokenizerBase, ids: list[int], texts: Iterable[str]) -> bool:
    """Whether one of the texts, of which `ids` were made, has letters that the tokenizer does not know."""
    unknown = _unknown_id(tokenizer)
    return unknown in ids and any(
        unknown in tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts
    )


def unmarked(text: str) -> str:
    """The text without the marks of `spelled`."""
    return str(mark_control_tokens(text, _NEVER))


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Tokens of a text with marks: what stands between marks in letters, the rest as the tokenizer has it.

    None where the tokenizer makes a control token of its letters too: see `without_control`.
    """
    try:
        return list(encode_marked_chat(tokenizer, text))
    except ValueError:
        return None


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
def _control_ids(
    tokenizer: PreTrainedTokenizerBase, template: str | None, size: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Numbers of the special tokens, and of all control tokens."""
    added = tokenizer.added_tokens_decoder.items()
    special = frozenset(tokenizer.all_special_ids) | {number for number, token in added if token.special}
    return special, special | frozenset(tokenizer.convert_tokens_to_ids(_others(tokenizer, template)))


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of unknown letters; None where there is none but a name for another one, as byte-level BPE has it."""
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


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
