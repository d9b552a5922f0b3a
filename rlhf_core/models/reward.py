"""Reward model: a decoder whose hidden states become one score a response.

The score is the last response token's scalar (`last`; Ouyang et al. 2022), the mean or sum of all response tokens'
scalars, or a sum gated by the model's own log-probabilities (`gated`), then standardised by two buffers.
Shape suffixes: B = rows, R = response tokens, D = hidden size.
"""

import copy
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.data.batches import SequenceBatch
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.folder import read_json
from rlhf_core.models.policy import load_pretrained, response_states, save_policy
from rlhf_core.rollout.logprobs import token_logprobs
from rlhf_core.state.atomic import write_json

Head = Literal["last", "mean", "sum", "gated"]
SUMMED = ("sum", "gated")
HEAD_FILE, HEAD_WEIGHTS = "reward_head.json", "reward_head.safetensors"
LOWEST_LOGPROB, LOGPROB_SHIFT = -8.0, 1.0


class RewardModel(nn.Module):
    """A decoder with a scalar head.

    `gated` gives each response token t the value a_t + b_t * (max(logp_t, -8) + 1), where (a_t, b_t) is linear in
    its hidden state and logp_t is the token's log-probability under the body itself, from the hidden state before
    it. So the head can use what supervised fine-tuning already knows: which fact should have come next. Its output
    layer is the body's input embedding; where the language model did not tie the two, a frozen copy of its own.

    Args:
        body: decoder without output layer.
        head: how token values become a score.
        output_weight: [V, D], output layer for `gated` where it is not the input embedding.
    """

    shift: Tensor
    scale: Tensor
    output_weight: Tensor | None

    def __init__(self, body: PreTrainedModel, head: Head, output_weight: Tensor | None = None) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.scalar = nn.Linear(body.config.hidden_size, 2 if head == "gated" else 1)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("output_weight", output_weight)

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, head: Head, seed: int) -> "RewardModel":
        """A reward model on a copy of a language model's body.

        The scalar starts with standard deviation 1 / sqrt(D + 1) and no bias (Stiennon et al. 2020); that of
        `gated` starts at zero, so that the first gradient says which way log-probabilities count.
        """
        output = policy.get_output_embeddings().weight
        tied = output is policy.get_input_embeddings().weight
        frozen = None if head != "gated" or tied else output.detach().clone()
        model = cls(copy.deepcopy(policy.get_decoder()), head, frozen)
        with torch.no_grad():
            if head == "gated":
                model.scalar.weight.zero_()
            else:
                generator = torch.Generator().manual_seed(seed)
                spread = (policy.config.hidden_size + 1) ** -0.5
                drawn = torch.randn(model.scalar.weight.shape, generator=generator) * spread
                model.scalar.weight.copy_(drawn)
            model.scalar.bias.zero_()
        return model.to(policy.device).eval()

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Score each response, scores_B, float32: (raw score - shift) / scale."""
        return (self.raw_scores(batch) - self.shift) / self.scale

    def raw_scores(self, batch: SequenceBatch) -> Tensor:
        """Scores before standardisation, scores_B."""
        mask_BR = batch.response_mask_BR
        if self.head == "last":
            states_BCD = response_states(self.body, batch)
            last_B = mask_BR.sum(1).long()
            hidden_BD = states_BCD[torch.arange(len(last_B), device=last_B.device), last_B]
            return self.scalar(hidden_BD)[:, 0].float()
        total_B = self._token_values(batch).sum(1)
        return total_B / mask_BR.sum(1).clamp_min(1.0) if self.head == "mean" else total_B

    def token_scores(self, batch: SequenceBatch) -> Tensor:
        """What each response token adds to the score, scores_BR, for `sum` and `gated`; a row sums to its score.

        The constant shift is counted at the last token; padding has 0.

        Raises:
            ValueError: the head does not sum over tokens.
        """
        if self.head not in SUMMED:
            raise ValueError(f"head {self.head!r} gives a response one score, not one a token; {SUMMED} do")
        mask_BR = batch.response_mask_BR
        columns_R = torch.arange(1, mask_BR.shape[1] + 1, device=mask_BR.device)
        is_last_BR = columns_R == mask_BR.sum(1, keepdim=True)
        return (self._token_values(batch) - self.shift * is_last_BR) / self.scale

    def standardise(self, mean: float, deviation: float) -> None:
        """From now on a raw score of `mean` is 0 and one of `mean + deviation` is 1.

        Raises:
            ValueError: `deviation` is not positive, so scores could not be told apart.
        """
        if not deviation > 0:
            raise ValueError(f"standard deviation of the scores is {deviation}; the model scores everything alike")
        self.shift.fill_(mean)
        self.scale.fill_(deviation)

    def save(self, folder: Path | str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write body and tokenizer as `transformers` does, the head beside them in safetensors with a description."""
        folder = Path(folder)
        save_policy(self.body, tokenizer, folder)
        tensors = {"weight": self.scalar.weight, "bias": self.scalar.bias, "shift": self.shift, "scale": self.scale}
        if self.output_weight is not None:
            tensors["output_weight"] = self.output_weight
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / HEAD_WEIGHTS)
        write_json(folder / HEAD_FILE, {"head": self.head, "outputs": self.scalar.out_features})

    @classmethod
    def load(cls, folder: Path | str) -> "RewardModel":
        """Read what `save` wrote, in evaluation mode.

        Raises:
            EnvironmentProblem: the folder or files in it are missing.
            ConfigError: the folder asks for code of its own, or describes a head that does not exist.
        """
        folder = Path(folder)
        body = load_pretrained(AutoModel, folder)
        missing = [name for name in (HEAD_FILE, HEAD_WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise EnvironmentProblem(
                f"{folder}: missing {', '.join(missing)}: a language model, not a reward model. "
                "Fix: a folder that the reward stage wrote"
            )
        described = read_json(folder / HEAD_FILE)
        head: Head = described.get("head", "")
        if head not in get_args(Head):
            raise ConfigError(f"{folder / HEAD_FILE}: head: {head!r} is none. Fix: one of {', '.join(get_args(Head))}")
        tensors = load_file(folder / HEAD_WEIGHTS)
        model = cls(body, head, tensors.get("output_weight"))
        with torch.no_grad():
            for name, target in (("weight", model.scalar.weight), ("bias", model.scalar.bias)):
                target.copy_(tensors[name])
            model.shift.copy_(tensors["shift"])
            model.scale.copy_(tensors["scale"])
        return model.eval()

    def _token_values(self, batch: SequenceBatch) -> Tensor:
        """Scalar of each response token, values_BR, float32; padding has 0."""
        states_BCD = response_states(self.body, batch)
        mask_BR = batch.response_mask_BR
        outputs = self.scalar(states_BCD[:, 1:]).float()
        values_BR = outputs[..., 0]
        if self.head == "gated":
            logprobs_BR = self._own_logprobs(states_BCD, batch)
            values_BR = values_BR + outputs[..., 1] * (logprobs_BR.clamp_min(LOWEST_LOGPROB) + LOGPROB_SHIFT)
        return values_BR.masked_fill(mask_BR == 0, 0.0)

    def _own_logprobs(self, states_BCD: Tensor, batch: SequenceBatch) -> Tensor:
        real_BR = batch.mask_BS[:, batch.prompt_width :].bool()
        tied = self.output_weight is None
        weight_VD = self.body.get_input_embeddings().weight if tied else self.output_weight
        hidden_ND = states_BCD[:, :-1][real_BR]
        logprobs_N, _ = token_logprobs(hidden_ND, weight_VD, batch.response_ids_BR[real_BR])
        return logprobs_N.new_zeros(real_BR.shape).masked_scatter(real_BR, logprobs_N)
