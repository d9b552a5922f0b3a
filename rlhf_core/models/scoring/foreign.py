"""Reward models from elsewhere: any sequence classifier of `transformers` with one output, and its own tokenizer.

It reads texts and no tokens of ours: a prompt's turns and the response by its own chat template; without one, as the
pair that a tokenizer with separators makes (DeBERTa, BERT), else the prompt, a space, the response, the end token.
Shape suffixes: B = rows, S = tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_core.engine.batches import by_length
from rlhf_core.errors import ConfigError, check_finite
from rlhf_core.model_folder import weight_files
from rlhf_core.models.folders.architecture import outline, read_config
from rlhf_core.models.folders.stored_numbers import check_stored_numbers
from rlhf_core.models.policy import check_vocabulary, load_pretrained
from rlhf_core.models.scoring.classifier_folder import SHIFT
from rlhf_core.models.scoring.ensemble import ENSEMBLE_FILE
from rlhf_core.models.scoring.reward_model import HEAD_FILE
from rlhf_core.text.chat import fix_date
from rlhf_core.text.encoded import Encoded, TextCounts
from rlhf_core.text.tokenizer import encode_prompts, encode_samples, read_tokenizer
from rlhf_core.text.whole_dialogues import render_dialogues, with_reply

UNLIMITED = 10**9
"""Tokens: what tokenizers without a limit call their limit is larger."""


def is_foreign(folder: Path | str) -> bool:
    """Whether a reward model's folder lacks what this pipeline writes into its own: it is read as text then."""
    return not any((Path(folder) / name).is_file() for name in (HEAD_FILE, ENSEMBLE_FILE))


class Reading(NamedTuple):
    """One row as the model reads it: tokens, and which of two texts each is from, where it is told."""

    ids: list[int]
    types: list[int]


class ForeignRewardModel(nn.Module):
    """A sequence classifier with one output, which scores texts with its own tokenizer.

    Args:
        model: in evaluation mode.
        tokenizer: of the same folder.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.room = room_of(model.config, tokenizer)
        self.shift = float(model.config.to_dict().get(SHIFT, 0.0))

    @classmethod
    def load(cls, folder: Path | str) -> "ForeignRewardModel":
        """Read a folder, in evaluation mode, weights float32.

        Raises:
            EnvironmentProblem, ConfigError: see `check_classifier_folder`.
        """
        folder = Path(folder)
        check_one_output(folder, read_config(folder))
        model = load_pretrained(AutoModelForSequenceClassification, folder)
        return cls(model, load_scoring_tokenizer(folder)).eval()

    @torch.no_grad()
    def score_texts(
        self, prompts: Sequence[str], responses: Sequence[str], batch_size: int, counts: TextCounts | None = None
    ) -> list[float]:
        """The score of each response to its prompt, in the order given; `counts` is told of rows that lost something.

        Raises:
            DataError: a prompt is empty, or the chat template refuses it.
            Diverged: a score is no finite number.
        """
        rows = read_rows(self.tokenizer, prompts, responses, self.room, counts)
        scores = [0.0] * len(rows)
        # without a padding token the class reads the last one of the row, and wants one row at a time
        at_once = 1 if self.model.config.get_text_config().pad_token_id is None else batch_size
        for places in by_length([len(row.ids) for row in rows], at_once):
            for place, score in zip(places, self._forward([rows[place] for place in places]), strict=True):
                scores[place] = score + self.shift
        check_finite(scores, "reward model: the score of response")
        return scores

    def _forward(self, rows: Sequence[Reading]) -> list[float]:
        given = {
            "input_ids": self._padded([row.ids for row in rows], self.model.config.get_text_config().pad_token_id),
            "attention_mask": self._padded([[1] * len(row.ids) for row in rows], 0),
        }
        if rows[0].types:
            given["token_type_ids"] = self._padded([row.types for row in rows], 0)
        scores: list[float] = self.model(**given).logits[:, 0].float().tolist()
        return scores

    def _padded(self, rows: Sequence[list[int]], padding: int | None) -> Tensor:
        width = max(map(len, rows))
        filled = [row + [padding or 0] * (width - len(row)) for row in rows]
        return torch.tensor(filled, device=self.model.device)


def check_classifier_folder(folder: Path) -> None:
    """Refuse a folder that is no sequence classifier with one output, or not whole; nothing of its weights is loaded.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: it is a language model, has several outputs or no head, asks for code of its own, is a pickle, its
            numbers are not finite, or its tokenizer cannot be used.
    """
    config = read_config(folder)
    check_one_output(folder, config)
    model = outline(folder, AutoModelForSequenceClassification, config)
    check_stored_numbers(weight_files(folder), (name for name, _ in model.named_parameters()))
    try:
        check_vocabulary(model, load_scoring_tokenizer(folder))
    except ConfigError as error:
        raise error if str(error).startswith(str(folder)) else ConfigError(f"{folder}: {error}") from error


def check_one_output(folder: Path, config: PretrainedConfig) -> None:
    """Refuse what is no reward model.

    Raises:
        ConfigError: names what it is.
    """
    path, names = folder / "config.json", config.architectures or ()
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise ConfigError(
            f"{path}: architectures: {', '.join(names) or 'none'}: no sequence classifier, so it has no score. Fix: a "
            "reward model: one that this pipeline wrote, or any ...ForSequenceClassification with one output"
        )
    named = ", ".join(map(str, config.id2label.values()))
    if config.num_labels != 1:
        raise ConfigError(
            f"{path}: {config.num_labels} outputs ({named[:80]}): which of them is "
            "the score cannot be told. Fix: a reward model with one output (num_labels 1)"
        )


def load_scoring_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a classifier, with a chat template that knows one day only; it may have no end token.

    Raises:
        ConfigError: it cannot be read, or there is no way to write a prompt and a response with it.
    """
    tokenizer = read_tokenizer(folder)
    fix_date(tokenizer, str(folder))
    if tokenizer.chat_template is None and tokenizer.sep_token is None and tokenizer.eos_token is None:
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: no chat template, no separator and no end token: how prompt and "
            "response are written together is not known. Fix: give the tokenizer its chat_template"
        )
    return tokenizer


def read_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    room: int,
    counts: TextCounts | None = None,
) -> list[Reading]:
    """Prompts and responses as the classifier reads them; rows longer than `room` lose their beginning."""
    if tokenizer.chat_template is not None:
        dialogues = [with_reply(*row) for row in zip(prompts, responses, strict=True)]
        encoded = render_dialogues(tokenizer, dialogues, room)
        if counts is not None:
            counts.add_scored(encoded)
        return [Reading(row.ids, []) for row in encoded]
    if tokenizer.sep_token is not None:
        return _pairs(tokenizer, prompts, responses, room, counts)
    own = TextCounts()
    ends = encode_samples(tokenizer, responses, room - 1, own)
    begins = [encode_prompts(tokenizer, [one], room - len(end), own)[0] for one, end in zip(prompts, ends, strict=True)]
    if counts is not None:
        counts.scored_encoded += len(ends)
        counts.scored_cut += own.prompts_cut + own.responses_cut
        counts.scored_rewritten += own.prompts_rewritten + own.responses_rewritten
    return [Reading([*begin, *end], []) for begin, end in zip(begins, ends, strict=True)]


def _pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    room: int,
    counts: TextCounts | None,
) -> list[Reading]:
    """Two texts as the tokenizer joins them; nothing that somebody typed is a separator."""
    tokenizer.truncation_side = "left"
    texts = [prompt.strip() for prompt in prompts], [response.strip() for response in responses]
    whole = tokenizer(*texts, split_special_tokens=True)["input_ids"]
    rows = tokenizer(*texts, split_special_tokens=True, truncation="longest_first", max_length=room)
    if counts is not None:
        counts.add_scored(Encoded(ids, is_cut=len(ids) > room) for ids in whole)
    types = rows.get("token_type_ids", [[] for _ in prompts])
    return [Reading(list(ids), list(kinds)) for ids, kinds in zip(rows["input_ids"], types, strict=True)]


def room_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a row may have: the least of what model and tokenizer say."""
    known = config.get_text_config().to_dict()
    named = [known.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    places = [places for places in (*named, tokenizer.model_max_length) if places is not None and places < UNLIMITED]
    return int(min(places, default=UNLIMITED))
