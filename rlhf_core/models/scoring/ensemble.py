"""Several reward models as one: their scores added up to one score, and how much they disagree.

Shape suffixes: M = members, B = rows, Q = reference scores of a member.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.model_folder import read_json
from rlhf_core.models.folders.architecture import check_same_heads, read_heads
from rlhf_core.models.folders.stored_numbers import check_stored_numbers
from rlhf_core.models.scoring.heads import HeadSpec
from rlhf_core.models.scoring.reward_model import Details, RewardModel
from rlhf_core.models.scoring.standardised import Standardised
from rlhf_core.state.atomic import write_json

Aggregate = Literal["mean", "accuracy", "median", "vote", "pessimistic"]
ENSEMBLE_FILE, ENSEMBLE_WEIGHTS = "reward_ensemble.json", "reward_ensemble.safetensors"


class RewardEnsemble(Standardised):
    """Reward models whose raw scores are aggregated, and then standardised as one model's are.

    Every member is a whole model, in memory and on disk: that of an ensemble costs as much as all its members.

    Args:
        members: trained models, not standardised.
        aggregate: `mean`; `accuracy`, a mean with `weights_M`; `median`; `pessimistic`, the mean less `pessimism`
            deviations (Coste et al. 2024); `vote`, the mean over members of the share of their own reference scores
            that lie below: each member ranks the response and the ranks are averaged (the rule of Borda).
        pessimism: deviations that `pessimistic` takes off.
    """

    weights_M: Tensor
    reference_MQ: Tensor

    def __init__(self, members: Sequence[RewardModel], aggregate: Aggregate, pessimism: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.aggregate, self.pessimism = aggregate, pessimism
        self.register_buffer("weights_M", torch.full((len(members),), 1 / len(members)))
        self.register_buffer("reference_MQ", torch.zeros(len(members), 0))

    @property
    def body(self) -> PreTrainedModel:
        """The first member's body: what a value model may start from."""
        return self._models()[0].body

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Score each response, scores_B, float32: (raw score - shift) / scale."""
        return (self.raw_scores(batch) - self.shift) / self.scale

    @property
    def spec(self) -> HeadSpec:
        """What the members' heads are."""
        return self._models()[0].spec

    def raw_scores(self, batch: SequenceBatch) -> Tensor:
        """Aggregated scores before standardisation, scores_B."""
        return self.aggregate_and_members(batch)[0]

    def aggregate_and_members(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Aggregated scores before standardisation, scores_B, and those of every member, scores_MB."""
        scores_MB, deviations_MB, _ = self._ask(batch)
        return self._aggregated(scores_MB, deviations_MB), scores_MB

    def member_scores(self, batch: SequenceBatch) -> Tensor:
        """Raw scores of every member, scores_MB."""
        return self._ask(batch)[0]

    def details(self, batch: SequenceBatch) -> Details:
        """`forward`, with all that is known beside it.

        The deviation is the members' spread, joined by what they themselves give as deviation where they do; scores
        by criterion are the members' means.
        """
        scores_MB, deviations_MB, criteria_BC = self._ask(batch)
        return Details(
            scores_B=(self._aggregated(scores_MB, deviations_MB) - self.shift) / self.scale,
            deviations_B=total_deviation(scores_MB, deviations_MB) / self.unit,
            criteria_BC=criteria_BC,
            members_MB=scores_MB,
        )

    @property
    def unit(self) -> Tensor:
        """What a difference of the members' scores is divided by to be on the scale of the standardised ones.

        Ranks have no unit of the members' scores: the members' deviation over the references stands for it.
        """
        return self.reference_MQ.std(1, correction=0).mean() if self.aggregate == "vote" else self.scale

    def save(self, folder: Path | str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write each member to `member-<number>/` as a reward model of its own, the rest beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number, member in enumerate(self._models()):
            member.save(folder / f"member-{number}", tokenizer)
        tensors = {name: buffer.detach().cpu().contiguous() for name, buffer in self.named_buffers(recurse=False)}
        save_file(tensors, folder / ENSEMBLE_WEIGHTS)
        described = {"aggregate": self.aggregate, "members": len(self.members), "pessimism": self.pessimism}
        write_json(folder / ENSEMBLE_FILE, described)

    @classmethod
    def load(cls, folder: Path | str) -> "RewardEnsemble":
        """Read what `save` wrote, in evaluation mode.

        Raises:
            EnvironmentProblem: files are missing.
            ConfigError: the folder asks for code of its own; see `described_ensemble`.
        """
        folder = Path(folder)
        described = described_ensemble(folder)
        members = [RewardModel.load(member) for member in member_folders(folder)]
        model = cls(members, described["aggregate"], described["pessimism"])
        for name, tensor in load_file(folder / ENSEMBLE_WEIGHTS).items():
            setattr(model, name, tensor)
        return model.eval()

    def _models(self) -> list[RewardModel]:
        return [member for member in self.members if isinstance(member, RewardModel)]

    def _aggregated(self, scores_MB: Tensor, deviations_MB: Tensor | None) -> Tensor:
        match self.aggregate:
            case "mean":
                return scores_MB.mean(0)
            case "accuracy":
                return (self.weights_M[:, None] * scores_MB).sum(0)
            case "median":
                return scores_MB.quantile(0.5, dim=0)
            case "pessimistic":
                return scores_MB.mean(0) - self.pessimism * total_deviation(scores_MB, deviations_MB)
            case "vote":
                return ranks_among(scores_MB, self.reference_MQ).mean(0)

    def _ask(self, batch: SequenceBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Raw scores of every member, their own deviations, and the mean scores by criterion, where there are any."""
        said = [member.details(batch) for member in self._models()]
        deviations = [one.deviations_B for one in said if one.deviations_B is not None]
        criteria = [one.criteria_BC for one in said if one.criteria_BC is not None]
        return (
            torch.stack([one.scores_B for one in said]),
            torch.stack(deviations) if deviations else None,
            torch.stack(criteria).mean(0) if criteria else None,
        )


def total_deviation(scores_MB: Tensor, deviations_MB: Tensor | None) -> Tensor:
    """Deviation of a mixture of members, deviation_B (Lakshminarayanan et al. 2017, section 2.4).

    The variance of the members' scores (epistemic; divided by M - 1, since they are a sample of the models that
    training could have given; 0 for a single one), plus the mean of their own variances where they have any.
    """
    variance_B = scores_MB.var(0) if len(scores_MB) > 1 else torch.zeros_like(scores_MB[0])
    if deviations_MB is not None:
        variance_B = variance_B + deviations_MB.square().mean(0)
    return variance_B.sqrt()


def accuracy_weights(accuracies: Sequence[float], num_pairs: Sequence[int]) -> list[float]:
    """Weights of members by their share of pairs right: log-odds, none below chance, summing to 1.

    The log-odds are what votes of independent judges weigh (Nitzan and Paroush 1982). A share is drawn half a pair
    toward chance (Laplace), so that one without an error has a finite weight; where nobody is better than chance all
    count the same.
    """
    shares = [(a * n + 0.5) / (n + 1) for a, n in zip(accuracies, num_pairs, strict=True)]
    odds = torch.tensor(shares, dtype=torch.float64).logit().clamp_min(0.0)
    if not odds.any():
        odds = torch.ones_like(odds)
    return (odds / odds.sum()).tolist()


def ranks_among(scores_MB: Tensor, reference_MQ: Tensor) -> Tensor:
    """For each member the share of its reference scores below a score, ranks_MB in [0, 1].

    Between two neighbours of the sorted references the rank goes on in a line, so that scores apart stay apart; below
    the lowest it is 0 and above the highest 1.
    """
    count = reference_MQ.shape[1]
    above_MB = torch.searchsorted(reference_MQ, scores_MB.contiguous()).clamp(1, count - 1)
    low_MB, high_MB = reference_MQ.gather(1, above_MB - 1), reference_MQ.gather(1, above_MB)
    part_MB = ((scores_MB - low_MB) / (high_MB - low_MB).clamp_min(torch.finfo(scores_MB.dtype).tiny)).clamp(0.0, 1.0)
    return (above_MB - 1 + part_MB) / (count - 1)


def described_ensemble(folder: Path) -> dict[str, Any]:
    """How an ensemble's folder says that its members' scores become one; its own tensors are checked, not read.

    Raises:
        EnvironmentProblem: the file of its tensors is missing.
        ConfigError: the aggregation does not exist, or the tensors are not those of so many members, or hold NaN or
            infinity.
    """
    described, path = read_json(folder / ENSEMBLE_FILE), folder / ENSEMBLE_WEIGHTS
    known = get_args(Aggregate)
    if described.get("aggregate") not in known:
        raise ConfigError(
            f"{folder / ENSEMBLE_FILE}: aggregate: {described.get('aggregate')!r} is none. Fix: one of {known}"
        )
    pessimism = described.setdefault("pessimism", 0.0)
    if type(pessimism) not in (int, float) or not math.isfinite(pessimism):
        raise ConfigError(f"{folder / ENSEMBLE_FILE}: pessimism: {pessimism!r} is no number. Fix: copy it again")
    if not path.is_file():
        raise EnvironmentProblem(f"{folder}: missing {ENSEMBLE_WEIGHTS}. Fix: copy the folder again")
    found, count = read_heads(path), len(member_folders(folder))
    references = found["reference_MQ"].shape[1:] if "reference_MQ" in found else (0,)
    shapes = {"shift": (), "scale": (), "weights_M": (count,), "reference_MQ": (count, *references[:1])}
    wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    check_same_heads(found, wanted, path)
    check_stored_numbers([path])
    return described


def member_folders(folder: Path | str) -> list[Path]:
    """The reward models of a folder, one or several: each a folder of its own.

    Raises:
        ConfigError: the description of an ensemble does not say how many there are.
    """
    folder = Path(folder)
    if not (folder / ENSEMBLE_FILE).is_file():
        return [folder]
    count = read_json(folder / ENSEMBLE_FILE).get("members")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"{folder / ENSEMBLE_FILE}: members: {count!r} is no number of models. Fix: copy it again")
    return [folder / f"member-{number}" for number in range(count)]


def tokenizer_folder(folder: Path | str) -> Path:
    """Where the tokenizer of a reward model stands, of one model or of several."""
    return member_folders(folder)[0]


def load_reward_model(folder: Path | str) -> RewardModel | RewardEnsemble:
    """The reward model of a folder, one or several: a callable that scores a batch.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: the folder asks for code of its own, or describes what does not exist.
    """
    if (Path(folder) / ENSEMBLE_FILE).is_file():
        return RewardEnsemble.load(folder)
    return RewardModel.load(folder)
