"""The normal form under which two texts count as the same, and the characters no text may hold."""

import re
import unicodedata

REFUSED_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters but tab and line ends, and halves of surrogate pairs: no text of people has a use for them,
and they break databases, terminals and tokenizers."""


def normal_form(text: str) -> str:
    """The text in NFC, caseless, with every run of white space as one blank and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())
