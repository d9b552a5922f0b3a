"""Reward model: a decoder whose hidden states become one score a response.

A head (`rlhf_core.models.scoring.heads`) gives a raw score for each criterion; their weighted sum, standardised by two
buffers, is what a policy is given.
Shape suffixes: B = rows, R = response tokens, C = criteria, D = hidden size, V = vocabulary.
"""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.engine.output_layer import has_plain_head, token_logprobs
from rlhf_core.engine.states import final_states, response_states
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.model_folder import read_json
from rlhf_core.models.folders.architecture import check_same_heads, read_config, read_heads
from rlhf_core.models.folders.direction import check_direction
from rlhf_core.models.folders.stored_numbers import check_stored_numbers
from rlhf_core.models.policy import load_pretrained, save_policy
from rlhf_core.models.scoring.classifier_folder import LinearScore, save_classifier, why_no_class, why_no_padding
from rlhf_core.models.scoring.heads import (
    Head,
    HeadSpec,
    ScoreHead,
    describe_head,
    mean_state,
    read_head,
    why_not_linear,
)
from rlhf_core.models.scoring.standardised import Standardised
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.state.atomic import write_json

HEAD_FILE, HEAD_WEIGHTS = "reward_head.json", "reward_head.safetensors"


Beside = Literal["states", "logprobs"]


class RewardOutput(NamedTuple):
    """What one pass over a batch says of each response; what was not asked for is None.

    Attributes:
        scores_BC: raw scores, one a criterion.
        log_variances_BC: of the scores, where the head gives them.
        states_BD: mean hidden state.
        logprobs_B: log-probability under the body.
    """

    scores_BC: Tensor
    log_variances_BC: Tensor | None = None
    states_BD: Tensor | None = None
    logprobs_B: Tensor | None = None


class Details(NamedTuple):
    """A batch's scores and what stands behind them; None where the model has no such thing.

    Attributes:
        scores_B: standardised, what a policy is given.
        deviations_B: standard deviation of each score, on its scale.
        criteria_BC: raw score for each criterion, where there are several.
        members_MB: raw score of each member of an ensemble.
    """

    scores_B: Tensor
    deviations_B: Tensor | None = None
    criteria_BC: Tensor | None = None
    members_MB: Tensor | None = None


class RewardModel(Standardised):
    """A decoder with a head of scalars.

    The `gated` head uses what supervised fine-tuning already knows: which fact should have come next. Its output
    layer is the body's input embedding; where the language model did not tie the two, a frozen copy of its own.

    Args:
        body: decoder without output layer.
        spec: the head.
        output_weight: [V, D], output layer for log-probabilities where it is not the input embedding.
    """

    output_weight: Tensor | None

    def __init__(self, body: PreTrainedModel, spec: HeadSpec, output_weight: Tensor | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = ScoreHead(spec, body.config.hidden_size)
        self.register_buffer("output_weight", output_weight)

    @classmethod
    def from_policy(
        cls, policy: PreTrainedModel, head: Head | HeadSpec, seed: int, *, keep_output: bool = False
    ) -> "RewardModel":
        """A reward model on a copy of a language model's body, with a new head.

        Args:
            policy: the language model.
            head: what it is, or its kind alone.
            seed: of the head's first weights.
            keep_output: keep an output layer that is not tied, for the log-probabilities of a joint loss.

        Raises:
            ConfigError: log-probabilities are asked of a model whose output layer is no plain product.
        """
        spec = head if isinstance(head, HeadSpec) else HeadSpec(kind=head)
        if (keep_output or spec.kind == "gated") and not has_plain_head(policy):
            raise ConfigError(
                f"reward.head 'gated' and reward.auxiliary.sft_coef read log-probabilities, and those of "
                f"{type(policy).__name__} are not its states times an embedding (a bias, a cap or a scale). "
                "Fix: another head, such as 'last', and sft_coef 0"
            )
        output = policy.get_output_embeddings().weight
        tied = output is policy.get_input_embeddings().weight
        frozen = None if tied or not (keep_output or spec.kind == "gated") else output.detach().clone()
        model = cls(copy.deepcopy(policy.get_decoder()), spec, frozen)
        model.head.start(seed)
        return model.to(policy.device).eval()

    @property
    def spec(self) -> HeadSpec:
        """What the head is."""
        return self.head.spec

    @property
    def unit(self) -> Tensor:
        """What a difference of raw scores is divided by to be on the scale of the standardised ones."""
        return self.scale

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Score each response, scores_B, float32: (raw score - shift) / scale."""
        return (self.raw_scores(batch) - self.shift) / self.scale

    def raw_scores(self, batch: SequenceBatch) -> Tensor:
        """Scores before standardisation, scores_B: the criteria's weighted sum, less the pessimism."""
        return self._combined(self.read(batch))[0]

    def details(self, batch: SequenceBatch) -> Details:
        """`forward`, with all that is known beside it."""
        reading = self.read(batch)
        raw_B, deviation_B = self._combined(reading)
        return Details(
            scores_B=(raw_B - self.shift) / self.scale,
            deviations_B=None if deviation_B is None else deviation_B / self.scale,
            criteria_BC=reading.scores_BC if len(self.spec.criteria) > 1 else None,
        )

    def read(self, batch: SequenceBatch, beside: Collection[Beside] = ()) -> RewardOutput:
        """Everything that training needs, from one forward pass of the body.

        Args:
            batch: prompts and responses.
            beside: what to give beside scores and variances.
        """
        mask_BR = batch.response_mask_BR
        if self.spec.kind == "last" and not beside:
            states_BCD = final_states(self.body, batch)[:, None]
        else:
            states_BCD = response_states(self.body, batch)
        logprobs_BR = None
        if "logprobs" in beside or self.spec.kind == "gated":
            logprobs_BR = self._own_logprobs(states_BCD, batch)
        return RewardOutput(
            scores_BC=self.head(states_BCD, mask_BR, logprobs_BR),
            log_variances_BC=self.head.log_variances(states_BCD, mask_BR) if self.spec.spread else None,
            states_BD=mean_state(states_BCD, mask_BR) if "states" in beside else None,
            logprobs_B=masked_sum(logprobs_BR, mask_BR) if logprobs_BR is not None and "logprobs" in beside else None,
        )

    def save(self, folder: Path | str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write body and tokenizer as `transformers` does, the head beside them in safetensors with a description.

        Where the head is linear in the last token's state the folder is a plain sequence classifier, too.
        """
        folder = Path(folder)
        if why_not_linear(self.spec) or why_no_class(self.body) or why_no_padding(tokenizer):
            save_policy(self.body, tokenizer, folder)
        else:
            save_classifier(self.body, self.linear_score(), tokenizer, folder)
        tensors = self._head_tensors()
        if self.output_weight is not None and self.spec.kind == "gated":
            tensors["output_weight"] = self.output_weight
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / HEAD_WEIGHTS)
        write_json(folder / HEAD_FILE, describe_head(self.spec) | {"outputs": self.head.scalar.out_features})

    @classmethod
    def load(cls, folder: Path | str) -> "RewardModel":
        """Read what `save` wrote, in evaluation mode.

        Raises:
            EnvironmentProblem: the folder or files in it are missing.
            ConfigError: the folder asks for code of its own, is not whole, or describes a head that does not exist.
        """
        folder = Path(folder)
        spec = described_head(folder)
        body = load_pretrained(folder_class(read_config(folder)), folder).base_model
        check_head(folder, spec, body)
        check_direction(body, str(folder))
        tensors = load_file(folder / HEAD_WEIGHTS)
        model = cls(body, spec, tensors.get("output_weight"))
        with torch.no_grad():
            for name, target in model._head_tensors().items():
                target.copy_(tensors[name])
        return model.eval()

    @torch.no_grad()
    def linear_score(self) -> LinearScore:
        """The standardised score as a linear map of the last token's state, for heads that are one."""
        weights_C, scalar = self.head.weights_C.double(), self.head.scalar
        weight_D = weights_C @ scalar.weight.double() / self.scale
        constant = (weights_C @ scalar.bias.double() - self.shift) / self.scale
        return LinearScore(weight_D.float(), float(constant))

    def _head_tensors(self) -> dict[str, Tensor]:
        """Weights of the head and the two numbers of `standardise`, by their names in the file."""
        weights = {name.removeprefix("scalar."): tensor for name, tensor in self.head.named_parameters()}
        return weights | {"shift": self.shift, "scale": self.scale}

    def _own_logprobs(self, states_BCD: Tensor, batch: SequenceBatch) -> Tensor:
        """Log-probability of each response token under the body and its output layer, logprobs_BR; padding has 0."""
        real_BR = batch.mask_BS[:, batch.prompt_width :].bool()
        tied = self.output_weight is None
        weight_VD = self.body.get_input_embeddings().weight if tied else self.output_weight
        hidden_ND = states_BCD[:, :-1][real_BR]
        logprobs_N, _ = token_logprobs(hidden_ND, weight_VD, batch.response_ids_BR[real_BR])
        return logprobs_N.new_zeros(real_BR.shape).masked_scatter(real_BR, logprobs_N)

    def _combined(self, reading: RewardOutput) -> tuple[Tensor, Tensor | None]:
        """Raw score and its deviation over all criteria."""
        raw_B = self.head.combine(reading.scores_BC)
        if reading.log_variances_BC is None:
            return raw_B, None
        deviation_B = self.head.combined_deviation(reading.log_variances_BC)
        return raw_B - self.spec.pessimism * deviation_B, deviation_B


def folder_class(config: PretrainedConfig) -> Any:
    """The class that reads the body of a reward model's folder: of a plain sequence classifier, with its score."""
    names = config.architectures or ()
    is_classifier = any(name.endswith("ForSequenceClassification") for name in names)
    return AutoModelForSequenceClassification if is_classifier else AutoModel


def described_head(folder: Path) -> HeadSpec:
    """The head that a reward model's folder describes.

    Raises:
        EnvironmentProblem: the folder or the head's files are missing.
        ConfigError: there is no such head.
    """
    missing = [name for name in (HEAD_FILE, HEAD_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        what = "a language model, not a reward model" if folder.is_dir() else "there is no such folder"
        raise EnvironmentProblem(
            f"{folder}: missing {', '.join(missing)}: {what}. Fix: a folder that the reward stage wrote"
        )
    return read_head(read_json(folder / HEAD_FILE), folder / HEAD_FILE)


def check_head(folder: Path, spec: HeadSpec, body: PreTrainedModel) -> None:
    """Refuse a head whose tensors are not those of its description; `body` may be on the meta device.

    Raises:
        ConfigError: names and shapes that differ, or tensors that hold NaN or infinity.
    """
    found = read_heads(folder / HEAD_WEIGHTS)
    output = found.pop("output_weight", None)
    with torch.device("meta"):
        wanted = RewardModel(body, spec)._head_tensors()
    if output is not None:
        found["output_weight"] = output
    if output is not None or (spec.kind == "gated" and not body.config.tie_word_embeddings):
        wanted["output_weight"] = body.get_input_embeddings().weight
    check_same_heads(found, wanted, folder / HEAD_WEIGHTS)
    check_stored_numbers([folder / HEAD_WEIGHTS])
