"""Text of a response while its tokens arrive: only what no later token can take back is given out."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_core.text.chat import reply_form

HALF = "\ufffd"
"""What a tokenizer writes for a character of which some bytes are still missing."""


class TextStream:
    """A response's text, piece by piece; put together the pieces are what `rlhf_core.text.tokenizer` makes of it whole.

    Args:
        decode: text of tokens.
        stops: texts of which the first to appear ends the response; it is no part of it.
        strip: white space at both ends is no part of the response.
        lead, trail: what a chat template writes before and after every reply; no part of it either.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        *,
        strip: bool = False,
        lead: str = "",
        trail: str = "",
    ) -> None:
        self.decode, self.stops, self.strip, self.lead, self.trail = decode, tuple(stops), strip, lead, trail
        self.ids: list[int] = []
        self.given = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Take a token that is no end token; what is certain now and was not before."""
        self.ids.append(token)
        text = self._text()
        first = min((found for stop in self.stops if (found := text.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.is_stopped = True
            return self._give(self._ended(text[:first]))
        if self.lead and self.lead.startswith(text):
            return ""
        text = text.rstrip() if self.strip else text
        certain = text[: len(text) - self._uncertain(text)]
        return self._give(certain.rstrip() if self.strip else certain)

    def finish(self) -> str:
        """No token follows: the rest of the text."""
        return "" if self.is_stopped else self._give(self._ended(self._text()))

    def _text(self) -> str:
        text = self.decode(self.ids)
        return text.lstrip().removeprefix(self.lead).lstrip() if self.strip else text

    def _ended(self, text: str) -> str:
        return text.rstrip().removesuffix(self.trail).rstrip() if self.strip else text

    def _uncertain(self, text: str) -> int:
        """How many characters at the end may still become others, or part of something that is not given out."""
        half = len(text) - len(text.rstrip(HALF))
        whole = text[: len(text) - half]
        ends = [end for end in (*self.stops, self.trail) if end]
        begun = max((size for end in ends for size in range(1, len(end) + 1) if whole.endswith(end[:size])), default=0)
        return half + begun

    def _give(self, text: str) -> str:
        new = text[len(self.given) :]
        self.given += new
        return new


def reply_stream(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> TextStream:
    """The stream of a reply: together what `decode_response` gives."""
    form = None if tokenizer.chat_template is None else reply_form(tokenizer)
    lead, trail = ("", "") if form is None else (form.lead, form.trail)
    return TextStream(plain_decoder(tokenizer), stops, strip=True, lead=lead, trail=trail)


def plain_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Tokens to text, control tokens left out and no space mended."""
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
