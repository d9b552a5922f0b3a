"""Dialogues with their last reply as tokens, as a chat template writes them: what a model of scores reads."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_core.text.chat import without_oldest, write_dialogues
from rlhf_core.text.encoded import Encoded
from rlhf_core.text.tool_turns import Conversation, read_reply
from rlhf_core.text.transcripts import conversation
from rlhf_core.text.whole import holds_turns, stands


def with_reply(prompt: str, response: str) -> Conversation:
    """A prompt's turns and tools, and the response as the turn after them."""
    asked = conversation(prompt)
    reply = read_reply(response) or {"role": "assistant", "content": response.strip()}
    return asked._replace(turns=[*asked.turns, reply])


def render_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Conversation], max_tokens: int
) -> list[Encoded]:
    """Tokens of whole dialogues, the last reply included.

    One longer than `max_tokens` loses its oldest turns as prompts do, and then its first tokens.

    Raises:
        DataError: the template refuses a dialogue.
    """
    encoded = []
    for dialogue, (text, ids) in zip(
        dialogues, write_dialogues(tokenizer, dialogues) if dialogues else [], strict=True
    ):
        kept, is_cut = dialogue, len(ids) > max_tokens
        is_whole = holds_turns(text, kept) and stands(kept.turns[-1], text)
        while len(ids) > max_tokens and (shorter := without_oldest(kept.turns)):
            kept = kept._replace(turns=shorter)
            ((_, ids),) = write_dialogues(tokenizer, [kept])
        encoded.append(Encoded(ids[max(len(ids) - max_tokens, 0) :], is_cut=is_cut, is_whole=is_whole))
    return encoded
