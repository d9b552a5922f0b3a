"""Prompts and responses as tokens by a tokenizer's own chat template.

A template is a program (Jinja) that came with the folder. It runs in transformers' sandbox, on text alone, and what a
user writes never becomes a control token. It must give the same tokens on every day and every time it is asked, or
reward model and PPO would read another prompt than was sampled from.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache, partial

from transformers import PreTrainedTokenizerBase

from rlhf_core.errors import ConfigError, DataError
from rlhf_core.text.control import encode_marked, has_unknown, spelled, unmarked, without_control
from rlhf_core.text.encoded import Encoded
from rlhf_core.text.tool_turns import Conversation, Message, read_reply, with_changed_texts
from rlhf_core.text.whole import holds_turns, stands, texts_of, within

TEMPLATE_DATE = date(2024, 7, 26)
"""The day it is in every template that asks for the date; Llama 3.1's falls back to this one itself."""

_QUESTION: Message = {"role": "user", "content": "question"}
_MARK = "ANSWER"
_CLOCK = "strftime_now"
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")
"""What Python writes of a function that a template names and does not call, such as `content.strip`."""
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag that transformers adds to the language


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyForm:
    """How a template writes the last reply of a dialogue.

    Attributes:
        opening: tokens of a dialogue of one question, up to where the reply begins.
        lead: what the template writes before the text of a reply, decoded; mostly nothing.
        trail: what it writes after the text and before the token that ends a reply, decoded; mostly nothing.
        around: what it writes before the reply, between that and the text, and after the text.
        end_id: the token that ends a reply; null where the template writes none.
        after_end: how many tokens the template writes after it.
    """

    opening: tuple[int, ...]
    lead: str
    trail: str
    around: tuple[str, str, str]
    end_id: int | None
    after_end: int


def fix_template(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Make a tokenizer's template, if it has one, give the same tokens on every day, and end with its end of a turn.

    The date becomes a constant, which the template carries from then on, also when the tokenizer is saved. The
    tokenizer's end token becomes the one that the template writes after a reply.

    Raises:
        ConfigError: the template cannot be used: it does not parse, asks for random numbers, has no place for a
            reply, or opens a reply in another way than it writes a finished one.
    """
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.chat_template = _with_fixed_date(_default_template(tokenizer))
        end = reply_form(tokenizer).end_id
        if end is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        if reply_form(tokenizer).end_id != end:
            raise ConfigError("what it ends a reply with depends on the end token")
    except ConfigError as error:
        raise ConfigError(f"{origin}: chat_template: {error}. Fix: model.chat: plain, or another template") from None


def fix_date(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Make a tokenizer's template, if it has one, give the same text on every day; its end token stays what it is.

    Raises:
        ConfigError: the template does not parse or asks for random numbers.
    """
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.chat_template = _with_fixed_date(_default_template(tokenizer))
    except ConfigError as error:
        raise ConfigError(f"{origin}: chat_template: {error}. Fix: another template") from None


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template, or of several the one that dialogues without tools are written by."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
        if template is None:
            raise ConfigError(f"none of {', '.join(tokenizer.chat_template)} is named default")
    if not isinstance(template, str):
        raise ConfigError(f"it is no text but {type(template).__name__}")
    return template


def reply_form(tokenizer: PreTrainedTokenizerBase) -> ReplyForm:
    """`ReplyForm` of the tokenizer's template.

    Raises:
        ConfigError: see `fix_template`; says what is wrong without saying where.
    """
    return _reply_form(tokenizer, tokenizer.chat_template, tokenizer.eos_token)


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Conversation], max_tokens: int
) -> list[Encoded]:
    """Tokens of dialogues up to where the assistant is to speak.

    One longer than `max_tokens` loses its oldest turns, but never the system's turn nor the last of the user; where
    that is not enough it loses its first tokens, which is left to the caller.

    Raises:
        DataError: the template refuses a dialogue, for a system turn it does not know, say.
    """
    written = write_dialogues(tokenizer, dialogues, add_generation_prompt=True)
    encoded = []
    for dialogue, (text, ids) in zip(dialogues, written, strict=True):
        kept = dialogue
        is_whole = holds_turns(text, kept) and not has_unknown(tokenizer, ids, texts_of(kept.turns))
        while len(ids) > max_tokens and (shorter := without_oldest(kept.turns)):
            kept = kept._replace(turns=shorter)
            ((_, ids),) = write_dialogues(tokenizer, [kept], add_generation_prompt=True)
        encoded.append(Encoded(ids, is_cut=len(kept.turns) < len(dialogue.turns), is_whole=is_whole))
    return encoded


def render_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Tokens of replies as the template writes them, up to and with the end token.

    A template is a program and can leave out part of a reply (thoughts, say) or write it differently: such a reply is
    not whole.
    """
    if not texts:
        return []
    form = reply_form(tokenizer)
    replies = [read_reply(text) or {"role": "assistant", "content": text.strip()} for text in texts]
    written = write_dialogues(tokenizer, [Conversation([_QUESTION, reply], []) for reply in replies])
    encoded = []
    for reply, (text, ids) in zip(replies, written, strict=True):
        is_whole = stands(reply, within(text, form.around)) and not has_unknown(tokenizer, ids, texts_of([reply]))
        if not is_whole or ("tool_calls" in reply and not _stands_as_replies(text, form)):
            encoded.append(Encoded([], is_whole=False))
        elif form.end_id is not None:
            encoded.append(Encoded(_reply_of(ids, form)))
        else:
            encoded.append(Encoded([*_reply_of(ids, form), tokenizer.eos_token_id]))
    return encoded


def _stands_as_replies(text: str, form: ReplyForm) -> bool:
    """Whether a rendered call stands behind the same opening, and ends in the same way, as every other reply."""
    opening, _, tail = form.around
    return text.startswith(opening) and text.endswith(tail)


def _reply_of(ids: list[int], form: ReplyForm) -> list[int]:
    start, end = len(form.opening), len(ids) - form.after_end
    if tuple(ids[:start]) != form.opening or (form.end_id is not None and ids[end - 1] != form.end_id):
        raise ConfigError(
            "model.chat: tokens of a reply run over the border to what the chat template writes around it. "
            "Fix: model.chat: plain, or a template with control tokens around a reply"
        )
    return ids[start:end]


@lru_cache(maxsize=8)
def _reply_form(tokenizer: PreTrainedTokenizerBase, template: str, eos_token: str) -> ReplyForm:
    opening = _render(tokenizer, [_QUESTION], add_generation_prompt=True)
    whole = _render(tokenizer, [_QUESTION, {"role": "assistant", "content": _MARK}])
    if not whole.startswith(opening) or whole.count(_MARK) != 1:
        raise ConfigError("it does not write a reply behind what it opens a reply with")
    lead, tail = whole[len(opening) :].split(_MARK)
    tail_ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    controls = [place for place, token in enumerate(tail_ids) if token in tokenizer.added_tokens_decoder]
    lead_ids = tokenizer(lead, add_special_tokens=False)["input_ids"]
    return ReplyForm(
        opening=tuple(write_dialogues(tokenizer, [Conversation([_QUESTION], [])], add_generation_prompt=True)[0][1]),
        lead=tokenizer.decode(lead_ids, skip_special_tokens=True).strip(),
        trail=tokenizer.decode(tail_ids[: controls[0]], skip_special_tokens=True).strip() if controls else "",
        around=(opening, lead, tail),
        end_id=tail_ids[controls[0]] if controls else None,
        after_end=len(tail_ids) - controls[0] - 1 if controls else len(tail_ids),
    )


def write_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Conversation], *, add_generation_prompt: bool = False
) -> list[tuple[str, list[int]]]:
    """Text and tokens of dialogues; control tokens that somebody typed are letters in them."""
    marked = [with_changed_texts(dialogue, partial(spelled, tokenizer)) for dialogue in dialogues]
    try:
        texts = _applied(tokenizer, marked, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program: it divides by zero as well as it refuses
        if len(dialogues) > 1:  # which one?
            for place, dialogue in enumerate(dialogues, start=1):
                try:
                    write_dialogues(tokenizer, [dialogue], add_generation_prompt=add_generation_prompt)
                except DataError as found:
                    raise DataError(f"dialogue {place} of {len(dialogues)}: {found}") from None
        raise DataError(
            f"the chat template refuses it: {error}. Fix: mend the row (rlhf data show FILE --model FOLDER names such "
            "rows), or set model.chat: plain"
        ) from None
    written = []
    for text, dialogue in zip(texts, dialogues, strict=True):
        ids = encode_marked(tokenizer, text)
        if ids is None:  # no letters for a control token: without it, and so not whole
            bare = with_changed_texts(dialogue, partial(without_control, tokenizer))
            written += write_dialogues(tokenizer, [bare], add_generation_prompt=add_generation_prompt)
        else:
            written.append((unmarked(text), ids))
    return written


def _applied(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Conversation], *, add_generation_prompt: bool
) -> list[str]:
    """The template's texts of dialogues; those with the same tools in one call, as a call takes one list of them."""
    texts = [""] * len(dialogues)
    places: dict[str, list[int]] = {}
    for place, dialogue in enumerate(dialogues):
        places.setdefault(json.dumps(dialogue.tools) if dialogue.tools else "", []).append(place)
    for own in places.values():
        written = tokenizer.apply_chat_template(
            [dialogues[place].turns for place in own],
            tools=dialogues[own[0]].tools or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        for place, text in zip(own, written, strict=True):
            texts[place] = text
    return texts


def _render(
    tokenizer: PreTrainedTokenizerBase, dialogue: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(dialogue), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program
        raise ConfigError(f"it fails on a question and a reply ({error})") from None
    if found := _ADDRESS.search(text):
        raise ConfigError(f"it writes an object and not its text ({found[0]}), another one in every process")
    return text


def _with_fixed_date(template: str) -> str:
    """The template, with a macro before it in the place of the clock that it asks."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        language = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        parsed = language.parse(_GENERATION_TAG.sub("", template))
    except TemplateSyntaxError as error:
        raise ConfigError(f"it does not parse ({error})") from None
    if any(found.name == "random" for found in parsed.find_all(nodes.Filter)):
        raise ConfigError("it asks for random numbers, so no two renderings agree")
    if any(found.name == _CLOCK for found in parsed.find_all(nodes.Macro)):
        return template  # replaced before
    calls = [c for c in parsed.find_all(nodes.Call) if isinstance(c.node, nodes.Name) and c.node.name == _CLOCK]
    forms = [c.args[0].value for c in calls if c.args and isinstance(c.args[0], nodes.Const)]
    asked = [test for test in parsed.find_all(nodes.Test) if getattr(test.node, "name", None) == _CLOCK]  # is it there?
    named = [name for name in parsed.find_all(nodes.Name) if name.name == _CLOCK]
    if len(forms) + len(asked) < len(named):
        raise ConfigError("it asks for the date in a form that is computed")
    days = json.dumps({form: TEMPLATE_DATE.strftime(form) for form in sorted(set(forms))})
    return f"{{%- macro {_CLOCK}(form) %}}{{{{ {days}[form] }}}}{{% endmacro %}}{template}" if calls else template


def without_oldest(dialogue: Sequence[Message]) -> list[Message]:
    """The dialogue without its oldest turns up to the next of the user; empty where that would leave none."""
    system = [turn for turn in dialogue[:1] if turn["role"] == "system"]
    spoken = dialogue[len(system) :]
    later = [place for place, turn in enumerate(spoken) if place and turn["role"] == "user"]
    return [*system, *spoken[later[0] :]] if later else []
