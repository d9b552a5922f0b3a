"""Whether what a folder holds can be used by a run: asked before anything starts, so no model is made of it."""

from pathlib import Path

from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.errors import ConfigError, RlhfError
from rlhf_core.model_folder import weight_files
from rlhf_core.models.folders.architecture import first_line, outline, read_config
from rlhf_core.models.folders.direction import check_direction, check_direction_of
from rlhf_core.models.folders.stored_numbers import check_stored_numbers
from rlhf_core.models.policy import check_room, check_vocabulary
from rlhf_core.models.scoring.ensemble import ENSEMBLE_FILE, described_ensemble, member_folders
from rlhf_core.models.scoring.foreign import check_classifier_folder, is_foreign
from rlhf_core.models.scoring.reward_model import check_head, described_head, folder_class
from rlhf_core.text.tokenizer import ChatMode, load_tokenizer


def check_policy_folder(folder: Path, chat: ChatMode, tokens: int) -> None:
    """Refuse a folder whose language model cannot be trained or sampled from.

    Args:
        folder: model folder.
        chat: see `load_tokenizer`.
        tokens: the longest row.

    Raises:
        EnvironmentProblem, ConfigError: see `load_policy`, `check_stored_numbers`, `load_tokenizer`,
            `check_vocabulary`, `check_room` and `check_direction`.
    """
    _check(folder, AutoModelForCausalLM, chat, tokens)


def check_reward_folder(folder: Path, tokens: int) -> None:
    """Refuse a folder whose reward model, of one or several members, cannot be read.

    Raises:
        EnvironmentProblem, ConfigError: see `load_reward_model`, of one from elsewhere `check_classifier_folder`.
    """
    if is_foreign(folder):
        check_classifier_folder(folder)
        return
    if (folder / ENSEMBLE_FILE).is_file():
        described_ensemble(folder)
    for member in member_folders(folder):
        spec = described_head(member)
        check_head(member, spec, _check(member, None, "auto", tokens))


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, place: str) -> None:
    """Hold of a loaded language model and its tokenizer what can be held before: vocabulary, room, direction.

    Args:
        model: in evaluation mode.
        tokenizer: of the same folder.
        tokens: the longest row.
        place: named where they are refused.

    Raises:
        ConfigError: see `check_vocabulary`, `check_room` and `check_direction`.
    """
    _check_sizes(model, tokenizer, tokens, place)
    check_direction(model, place)


def _check(folder: Path, auto_class: type | None, chat: ChatMode, tokens: int) -> PreTrainedModel:
    """Check a language model, or the body of a reward model (`auto_class` None), without its numbers."""
    config = read_config(folder)
    whole = outline(folder, auto_class or folder_class(config), config)
    check_stored_numbers(weight_files(folder), (name for name, _ in whole.named_parameters()))
    model = whole if auto_class else whole.base_model
    if (folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(folder)
    tokenizer = load_tokenizer(folder, chat)
    _check_sizes(model, tokenizer, tokens, str(folder))
    check_direction_of(model, auto_class or AutoModel, str(folder))
    return model


def _generation_config(folder: Path) -> GenerationConfig:
    path = folder / "generation_config.json"
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{path}: transformers cannot use it ({first_line(error)}). Fix: copy it again") from error
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if not all(end is None or (type(end) is int and end >= 0) for end in ends):
        raise ConfigError(f"{path}: eos_token_id: {config.eos_token_id} is no number of a token. Fix: copy it again")
    return config


def _check_sizes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, place: str) -> None:
    try:
        check_vocabulary(model, tokenizer)
        check_room(model, tokens)
    except RlhfError as error:
        raise ConfigError(f"{place}: {error}") from error
