"""Reward models as plain sequence classifiers of `transformers`: which can be one, and a check that it is.

Shape suffixes: B = rows.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from rlhf_core.engine.batches import collate, cut
from rlhf_core.errors import ConfigError
from rlhf_core.models.scoring.classifier_folder import (
    SHIFT,
    LinearScore,
    save_classifier,
    why_no_class,
    why_no_padding,
)
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.heads import why_not_linear
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, opening_tokens
from rlhf_core.text.tool_turns import Message, read_reply
from rlhf_core.text.transcripts import earlier_replies, prompt_turns

TOLERANCE = 1e-5
ROWS_AT_ONCE = 8
Row = tuple[str, str]

SAMPLE_ROWS: Sequence[Row] = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three colours.", "Red, green and blue are three colours; there are many more of them, such as yellow."),
    (
        "\n\nHuman: Hello!\n\nAssistant: Hello, how can I help?\n\nHuman: Where is the shop?\n\nAssistant:",
        "It is in the north.",
    ),
    ("Write one word", "One"),
    ("How do I boil an egg? I have no clock.", "Put it into boiling water, and sing a song of seven minutes."),
)
"""Prompts and responses that the check reads where none are given: of unlike lengths, one of them a dialogue."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' ~ message['content'] | trim ~ eos_token }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""How a tokenizer without a template writes a dialogue here, behind its token that opens a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How a folder's scores by plain `transformers` compare with ours.

    Attributes:
        rows: prompts with a response that were read both ways.
        largest_difference: of the two scores of a row, `shift` added to the plain one.
        shift: what the class's output lacks of our score, the same for every text (`score_shift` in `config.json`); 0
            where its class has a place for a constant.
    """

    rows: int
    largest_difference: float
    shift: float


def why_not_classifier(model: RewardModel | RewardEnsemble, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a reward model cannot be a plain sequence classifier with the same scores; None where it can."""
    if not isinstance(model, RewardEnsemble):
        return why_not_linear(model.spec) or why_no_class(model.body) or why_no_padding(tokenizer)
    if len(model.members) > 1:
        return f"it has {len(model.members)} members, each with a body of its own, and a sequence classifier has one"
    if model.aggregate == "vote":
        return "its score is a rank among other scores, which is no linear map of a state"
    return why_not_classifier(_single(model), tokenizer)


def export_classifier(
    model: RewardModel | RewardEnsemble,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    rows: Sequence[Row] = SAMPLE_ROWS,
) -> Parity:
    """Write a reward model as a folder that `AutoModelForSequenceClassification` loads, and compare their scores.

    Where the tokenizer has no chat template the folder's writes texts as they are read here: a prompt as it stands, a
    reply after a space, the end token.

    Args:
        model: in evaluation mode, float32.
        tokenizer: its own.
        folder: to be written.
        rows: prompts and responses to compare the scores of, at least one.

    Raises:
        ConfigError: it cannot be one (`why_not_classifier`), or a score differs by more than `TOLERANCE`.
    """
    if reason := why_not_classifier(model, tokenizer):
        raise ConfigError(
            f"{folder}: no sequence classifier has this reward model's scores: {reason}. Fix: train with "
            "reward.head: last and one member (or ensemble.distill), or read the reward model with rlhf_core"
        )
    single = _single(model)
    save_classifier(single.body, _score(model, single), with_template(tokenizer), folder)
    plain, shift = plain_scores(folder, [dialogue(tokenizer, *row) for row in rows])
    ours = our_scores(model, tokenizer, rows)
    furthest = max(abs(one + shift - other) for one, other in zip(plain, ours, strict=True))
    if not furthest <= TOLERANCE:
        raise ConfigError(
            f"{folder}: its scores by plain transformers differ from ours by up to {furthest:.2g} (allowed: "
            f"{TOLERANCE:g}): chat template or tokenizer write these texts in another way than they are read here (of "
            "some types AutoTokenizer goes by the architecture and not by the folder). Fix: model.chat: plain, the "
            "architecture's own tokenizer, or read the reward model with rlhf_core"
        )
    return Parity(rows=len(rows), largest_difference=furthest, shift=shift)


def with_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template: its own, or one that writes what is read without one."""
    if tokenizer.chat_template is not None:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = ("{{ bos_token }}" if opening_tokens(tokenizer) else "") + PLAIN_TEMPLATE
    return changed


def dialogue(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[Message]:
    """A prompt and its response as messages, for the template of `with_template`; tools that may be called are none."""
    reply = read_reply(response) or {"role": "assistant", "content": response}
    if tokenizer.chat_template is not None:
        return [*prompt_turns(prompt), reply]
    spans = [place for span in earlier_replies(prompt) for place in span]
    pieces = [prompt[start:end] for start, end in zip([0, *spans], [*spans, None], strict=True)]
    roles = ("user", "assistant")
    return [*({"role": roles[number % 2], "content": piece} for number, piece in enumerate(pieces)), reply]


@torch.no_grad()
def plain_scores(folder: Path | str, dialogues: Sequence[list[Message]]) -> tuple[list[float], float]:
    """What `AutoModelForSequenceClassification` says of dialogues, and the folder's `score_shift`: none of it is ours.

    Texts are rendered by the chat template of the folder's tokenizer and padded by it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    texts = tokenizer.apply_chat_template(list(dialogues), tokenize=False)
    scores: list[float] = []
    for some in cut(texts, ROWS_AT_ONCE):
        batch = tokenizer(some, add_special_tokens=False, padding=True, return_tensors="pt")
        logits_B1 = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores += logits_B1[:, 0].tolist()
    return scores, float(model.config.to_dict().get(SHIFT, 0.0))


@torch.no_grad()
def our_scores(
    model: RewardModel | RewardEnsemble, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> list[float]:
    """The reward model's own scores of the rows, none of which is cut."""
    room = tokenizer.model_max_length
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in rows], room)
    responses = encode_responses(tokenizer, [response for _, response in rows], room)
    scores: list[float] = []
    for places in cut(range(len(rows)), ROWS_AT_ONCE):
        batch = collate([prompts[n] for n in places], [responses[n] for n in places], tokenizer.pad_token_id)
        scores += model(batch.to(model.shift.device)).tolist()
    return scores


def _single(model: RewardModel | RewardEnsemble) -> RewardModel:
    """The model itself, or the only member of an ensemble."""
    return cast(RewardModel, model.members[0]) if isinstance(model, RewardEnsemble) else model


def _score(model: RewardModel | RewardEnsemble, single: RewardModel) -> LinearScore:
    """The score of the whole as a linear map: that of the only member, standardised once more by an ensemble."""
    score = single.linear_score()
    if model is single:
        return score
    scale = float(model.scale)
    return LinearScore(score.weight_D / scale, (score.constant - float(model.shift)) / scale)
