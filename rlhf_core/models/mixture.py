"""Several policies as one: their weights averaged, or their next-token distributions mixed.

Averaged weights are a model like any other. A mixture needs every member at every token; it is a folder with all of
them and a description, and it answers to what sampling and scoring ask of a model.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.errors import ConfigError
from rlhf_core.model_folder import read_json
from rlhf_core.models.policy import load_policy, save_policy
from rlhf_core.state.atomic import write_json

DESCRIPTION = "mixture.json"


class PolicyMixture(nn.Module):
    """Writes each token from p = sum of share * p of a member; members share a vocabulary.

    A response's probability is then not a mean of the members' probabilities of it: the mixture follows, token by
    token, what any member goes on with.

    Its logits are log p, and a temperature T divides them as it divides any policy's: softmax(log p / T), mixed first
    and tempered then. So 0 takes the token that the mixture holds likeliest, top-k and top-p cut the mixture, and 1 is
    the mixture itself. Tempering the members before would mix other policies: towards 0 it comes to one member's
    favourite or another's, drawn by share, and greedy decoding would always be the heaviest member's alone.

    Args:
        members: policies on one device.
        shares: how much each counts; positive, their sum is 1.
    """

    def __init__(self, members: Sequence[PreTrainedModel], shares: Sequence[float]) -> None:
        super().__init__()
        if len(members) != len(shares) or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
            raise ValueError(f"shares {list(shares)} of {len(members)} members: one each, positive, 1 in sum")
        self.members = nn.ModuleList(members)
        self.shares = tuple(shares)
        first = members[0]
        self.config, self.generation_config = first.config, first.generation_config

    @property
    def device(self) -> torch.device:
        """Where the members lie."""
        return self.members[0].device

    def get_output_embeddings(self) -> nn.Module:
        """Those of the first member: the vocabulary is the same for all."""
        return self.members[0].get_output_embeddings()

    def save(self, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
        """Write members that each load by themselves, and the description."""
        folder = Path(folder)
        names = member_folders(len(self.members))
        for member, name in zip(self.members, names, strict=True):
            save_policy(member, tokenizer, folder / name)
        write_json(folder / DESCRIPTION, {"members": names, "shares": list(self.shares)})


def member_folders(count: int) -> list[str]:
    """Names of the members' folders in a mixture's: `member-1`, `member-2` and so on."""
    return [f"member-{number}" for number in range(1, count + 1)]


def mixed_logprobs(logprobs: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """log(sum of share * exp(logprob)), elementwise over tensors of one shape, without leaving the logarithm."""
    weighted = [one + math.log(share) for one, share in zip(logprobs, shares, strict=True)]
    return torch.logsumexp(torch.stack(weighted), 0)


@torch.no_grad()
def averaged_weights(members: Sequence[PreTrainedModel], shares: Sequence[float]) -> PreTrainedModel:
    """A model whose every weight is the mean of the members', by shares (Wortsman et al. 2022; Rame et al. 2023).

    Summed in float64. It works where the members were trained from common weights; `Raises` is for where it cannot.

    Raises:
        ConfigError: the members do not have the same weights by name and shape.
    """
    model = copy.deepcopy(members[0])
    states = [dict(member.named_parameters()) for member in members]
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ConfigError(
            "combine.methods weights: the members have other weights by name or shape. Fix: methods: [probabilities]"
        )
    for name, target in model.named_parameters():
        total = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        target.copy_(total)
    return model


def is_mixture(folder: Path | str) -> bool:
    """Whether a folder holds a mixture and not a single model."""
    return (Path(folder) / DESCRIPTION).is_file()


def load_any_policy(folder: Path | str) -> PreTrainedModel | PolicyMixture:
    """`load_policy`, for folders of mixtures too.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: the folder asks for code of its own, or its description cannot be used.
    """
    folder = Path(folder)
    if not is_mixture(folder):
        return load_policy(folder)
    described = read_json(folder / DESCRIPTION)
    try:
        shares = [float(share) for share in described["shares"]]
        names = member_folders(len(shares))
        if described["members"] != names:
            raise ValueError(f"members {described['members']} with {len(shares)} shares")
        return PolicyMixture([load_policy(folder / name) for name in names], shares).eval()
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / DESCRIPTION}: not a mixture that can be read ({error}). Fix: write it again"
        ) from error


def tokenizer_folder(folder: Path | str) -> Path:
    """Where the tokenizer of a policy's folder lies: with a mixture's first member, else in the folder itself."""
    return Path(folder) / member_folders(1)[0] if is_mixture(folder) else Path(folder)
