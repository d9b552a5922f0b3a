"""A reward model to start training from: a sequence classifier from elsewhere, or one of ours."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_core.errors import ConfigError
from rlhf_core.models.folders.architecture import read_config
from rlhf_core.models.folders.direction import check_direction
from rlhf_core.models.policy import load_pretrained
from rlhf_core.models.scoring.classifier_folder import SHIFT, why_no_class
from rlhf_core.models.scoring.ensemble import ENSEMBLE_FILE
from rlhf_core.models.scoring.foreign import check_one_output, is_foreign, load_scoring_tokenizer
from rlhf_core.models.scoring.heads import Head, HeadSpec
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import load_tokenizer


def load_start(folder: Path, head: Head, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    """The reward model of a folder, its raw scores as they were before they were standardised.

    Args:
        folder: a sequence classifier with one output on a decoder, or a reward model of one member.
        head: the kind that is to be trained.
        tokenizer: what pairs are read with: the model's vocabulary must be the same.

    Raises:
        EnvironmentProblem, ConfigError: the folder cannot be read, or is none that could be started from so.
    """
    if (folder / ENSEMBLE_FILE).is_file():
        raise ConfigError(f"{folder}: an ensemble, which is no start for one model. Fix: its member-0, say")
    own = load_scoring_tokenizer(folder) if is_foreign(folder) else load_tokenizer(folder)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{folder}: its tokenizer has another vocabulary than the SFT model's, with which pairs and policies are "
            "read. Fix: an SFT model of the same family (model.path), or use it as judge, guard or "
            "align.ppo.reward_model, which read texts"
        )
    model = _from_classifier(folder) if is_foreign(folder) else RewardModel.load(folder)
    if model.spec.kind != head:
        raise ConfigError(f"{folder}: has head {model.spec.kind!r}, not {head!r}. Fix: reward.head: {model.spec.kind}")
    return model


def started_from(start: RewardModel, spec: HeadSpec, seed: int) -> RewardModel:
    """A copy with a head of `spec`, each criterion of which begins as the one that the start has."""
    model = RewardModel(copy.deepcopy(start.body), spec, start.output_weight)
    model.head.start(seed)
    known = dict(start.head.named_parameters())
    with torch.no_grad():
        for name, weight in model.head.named_parameters():
            if name in known:
                times = len(weight) // len(known[name])
                weight.copy_(known[name].repeat(times, *[1] * (weight.dim() - 1)))
    return model.eval()


def _from_classifier(folder: Path) -> RewardModel:
    """Body and linear map of a sequence classifier."""
    check_one_output(folder, read_config(folder))
    classifier = load_pretrained(AutoModelForSequenceClassification, folder)
    if reason := why_no_class(classifier.base_model):
        raise ConfigError(f"{folder}: {reason}. Fix: a classifier that is a decoder with one linear map")
    check_direction(classifier.base_model, str(folder))
    model = RewardModel(classifier.base_model, HeadSpec(kind="last"))
    with torch.no_grad():
        model.head.scalar.weight.copy_(classifier.score.weight)
        model.head.scalar.bias.fill_(classifier.config.to_dict().get(SHIFT, 0.0))
        if classifier.score.bias is not None:
            model.head.scalar.bias += classifier.score.bias
    return model.eval()
