"""What of a text can be seen, the normal form under which two texts count as the same, and what no text may hold.

Seen is what makes a mark on the page, or space between marks. Not seen, and left out, are

- the characters that Unicode calls default-ignorable (DerivedCoreProperties, 16.0): zero-width spaces and joiners, soft
  hyphens, word joiners, byte order marks, directional marks and embeddings, fillers of Hangul, tags;
- variation selectors, which are among them: they choose another look of the same character (U+2764 in black or in red);
- annotation marks (U+FFF9 to U+FFFB), the musical null notehead (U+1D159) and the upper control characters (C1).

Three of them are seen through their neighbours, and stay there and nowhere else:

- ZERO WIDTH JOINER between two symbols, where it makes one emoji of them (UTS #51, ED-16);
- ZERO WIDTH JOINER and NON-JOINER after a virama, and NON-JOINER between two letters of Arabic or Syriac, where they
  change the letters' form (RFC 5892, A.1 and A.2);
- tags after a black flag, closed by U+E007F, where they say whose flag it is (UTS #51, ED-14a).

The blank pattern of Braille (U+2800) is white space here, as all that `str.isspace` says.
"""

import re
import unicodedata

REFUSED_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters but tab and line ends, and halves of surrogate pairs: no text of people has a use for them,
and they break databases, terminals and tokenizers."""

_FLAG = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f"
_HIDDEN = re.compile(
    f"({_FLAG})|"
    "[\x80-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_JOINERS = re.compile("[\u200c\u200d]+")
_NON_JOINER, _JOINER = "\u200c", "\u200d"
_VIRAMA = 9  # the canonical combining class of all viramas


def without_hidden(text: str) -> str:
    """The text without the characters that cannot be seen; white space and all else as it was."""
    if text.isascii():
        return text
    text = _HIDDEN.sub(lambda found: found[1] or "", text).replace("\u2800", " ")
    return _JOINERS.sub(_seen_joiner, text)


def visible(text: str) -> str:
    """What can be seen of the text, in NFC, every run of white space as one blank and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", without_hidden(text)).split())


def normal_form(text: str) -> str:
    """What can be seen of the text, caseless: two texts with one normal form are the same to a reader."""
    return " ".join(unicodedata.normalize("NFC", visible(text).casefold()).split())


def _seen_joiner(found: re.Match[str]) -> str:
    """The joiner that shapes what stands around it, or nothing."""
    text, start, end = found.string, found.start(), found.end()
    if start == 0 or end == len(text):
        return ""
    before, after = text[start - 1], text[end]
    if unicodedata.combining(before) == _VIRAMA:
        return found[0][0]
    if _JOINER in found[0] and _is_symbol(before) and _is_symbol(after):
        return _JOINER
    letter = next((one for one in reversed(text[max(0, start - 4) : start]) if not unicodedata.combining(one)), "a")
    return _NON_JOINER if _NON_JOINER in found[0] and _is_arabic(letter) and _is_arabic(after) else ""


def _is_symbol(character: str) -> bool:
    """Whether it may be a part of an emoji: symbols, the skin tones (Sk) and the two arrows of category Sm."""
    return unicodedata.category(character) in ("So", "Sk") or character in "↔↕"


def _is_arabic(character: str) -> bool:
    return unicodedata.bidirectional(character) == "AL"
