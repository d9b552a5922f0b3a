"""A model folder at work: a policy that writes or a reward model that scores, and texts as its tokens."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.errors import DataError
from rlhf_core.model_folder import read_json
from rlhf_core.models.mixture import PolicyMixture, load_any_policy, tokenizer_folder
from rlhf_core.models.policy import check_vocabulary, eos_token_ids
from rlhf_core.models.scoring import ensemble
from rlhf_core.models.scoring.ensemble import ENSEMBLE_FILE, RewardEnsemble, load_reward_model
from rlhf_core.models.scoring.reward_model import HEAD_FILE, RewardModel
from rlhf_core.serving.continuous import ContinuousSampler
from rlhf_core.serving.scoring import ScoringThread
from rlhf_core.serving.worker import SamplingThread
from rlhf_core.text.chat import render_prompts
from rlhf_core.text.tokenizer import encode_prompts, encode_response, load_tokenizer
from rlhf_core.text.tool_turns import Conversation, Message
from rlhf_core.text.transcripts import render_turns

NO_LIMIT = 10**9
"""Nothing is cut: a server says that a text is too long, where training cuts it."""

NO_POSITIONS = 1 << 20
"""Places of an architecture that has no limit of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """How much is served at once.

    Attributes:
        rows: responses under way at once.
        places: tokens of a prompt and its response together; the model may have fewer.
    """

    rows: int = 32
    places: int = 4096


class Texts:
    """Texts as a model's own tokens, cut nowhere.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._raw = copy.copy(tokenizer)
        self._raw.chat_template = None

    def of_messages(self, messages: Sequence[Message]) -> list[int]:
        """A dialogue up to where the assistant is to speak, as in training.

        By the chat template; without one a single question stands for itself, and several turns are written as
        `Human:` and `Assistant:`.

        Raises:
            DataError: the template refuses the dialogue or leaves a part of it out, or there is no such dialogue.
        """
        turns = [{**turn, "content": turn["content"].strip()} for turn in messages]
        if not turns or turns[-1]["role"] != "user":
            raise DataError("the last message must be the user's. Fix: leave out what stands behind it")
        if self.tokenizer.chat_template is None:
            return self.of_prompt(turns[0]["content"] if len(turns) == 1 else _transcript(turns))
        (encoded,) = render_prompts(self.tokenizer, [Conversation(turns, [])], NO_LIMIT)
        if not encoded.is_whole:
            raise DataError(
                "the model's chat template leaves out or rewrites part of these messages. Fix: messages without a "
                "system turn, or without the part that it cannot say"
            )
        return encoded.ids

    def of_prompt(self, prompt: str) -> list[int]:
        """A prompt as the data files have it.

        Raises:
            DataError: it is empty, or the template refuses it.
        """
        return encode_prompts(self.tokenizer, [prompt], NO_LIMIT)[0]

    def of_text(self, text: str) -> list[int]:
        """A text that is gone on with as it stands, no template around it.

        Raises:
            DataError: it is empty.
        """
        return encode_prompts(self._raw, [text], NO_LIMIT)[0]

    def of_response(self, response: str) -> list[int]:
        """A response and its end token.

        Raises:
            DataError: template or tokenizer do not write it whole.
        """
        return encode_response(self.tokenizer, response, NO_LIMIT)


def _transcript(turns: Sequence[Message]) -> str:
    try:
        return render_turns(turns)
    except ValueError as error:
        raise DataError(f"{error}. Fix: other messages, or a model with a chat template") from None


class ServedPolicy:
    """A policy that answers.

    Args:
        name: as callers know it.
        model: on the device where it is to run.
        tokenizer: the model's.
        room: how much is served at once.
    """

    def __init__(
        self, name: str, model: PreTrainedModel | PolicyMixture, tokenizer: PreTrainedTokenizerBase, room: Room
    ) -> None:
        self.name, self.tokenizer, self.texts = name, tokenizer, Texts(tokenizer)
        self.places = min(positions(model), room.places)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.eos_ids = eos_token_ids(model, tokenizer)
        self.thread = SamplingThread(ContinuousSampler(model, tokenizer.pad_token_id, most_rows=room.rows))

    def close(self) -> None:
        """End: what is under way fails."""
        self.thread.close()


class ServedScorer:
    """A reward model that scores.

    Args:
        name: as callers know it.
        model: on the device where it is to run.
        tokenizer: the model's.
        room: how much is served at once.
    """

    def __init__(
        self,
        name: str,
        model: RewardModel | RewardEnsemble,
        tokenizer: PreTrainedTokenizerBase,
        room: Room,
    ) -> None:
        self.name, self.texts = name, Texts(tokenizer)
        config = next(part.config for part in model.modules() if isinstance(part, PreTrainedModel))
        self.places = min(positions_of(config.to_dict()), room.places)
        self.thread = ScoringThread(model, tokenizer.pad_token_id)

    def close(self) -> None:
        """End, when what was asked is answered."""
        self.thread.close()


Served = ServedPolicy | ServedScorer


def is_reward_model(folder: Path) -> bool:
    """Whether a folder's model scores and does not write."""
    if any((folder / name).is_file() for name in (HEAD_FILE, ENSEMBLE_FILE)):
        return True
    config = folder / "config.json"
    kinds = (read_json(config).get("architectures") if config.is_file() else None) or []
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def serve_folder(name: str, folder: Path, device: torch.device, room: Room) -> Served:
    """Load a folder and put it to work.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: it cannot be used, see `load_any_policy` and `load_reward_model`.
    """
    if is_reward_model(folder):
        scorer = load_reward_model(folder).to(device)
        return ServedScorer(name, scorer, load_tokenizer(ensemble.tokenizer_folder(folder)), room)
    policy, tokenizer = load_any_policy(folder), load_tokenizer(tokenizer_folder(folder))
    check_vocabulary(policy.members[0] if isinstance(policy, PolicyMixture) else policy, tokenizer)
    return ServedPolicy(name, policy.to(device), tokenizer, room)


def positions(model: PreTrainedModel | PolicyMixture) -> int:
    """How many tokens a row of a model may have; of a mixture, a row of every member."""
    members = list(model.members) if isinstance(model, PolicyMixture) else [model]
    return min(positions_of(member.config.to_dict()) for member in members)


def positions_of(config: dict[str, object]) -> int:
    """`positions` as a configuration names them."""
    named = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((places for places in named if isinstance(places, int)), NO_POSITIONS)
