"""Heads of a reward model: how hidden states over a response become one score for each criterion.

With v_t = w · h_t + b the value of response token t of T:

- `last`: v_T (Ouyang et al. 2022).
- `mean`: the mean of v_t.
- `sum`: the sum of v_t.
- `attention`: sum of a_t v_t with a = softmax(q · h_t / sqrt(D)) over the response, q learned and zero at first, so
  that it starts as `mean`.
- `mixed`: alpha * last + (1 - alpha) * mean, alpha = sigmoid of one learned number (1/2 at first), or given.
- `gated`: the sum of a_t + b_t * (max(logp_t, -8) + 1), where (a_t, b_t) is linear in h_t and logp_t the token's
  log-probability under the body itself.

Shape suffixes: B = rows, R = response tokens, C = criteria, D = hidden size; the states' second axis is R + 1.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rlhf_core.errors import ConfigError

Head = Literal["last", "mean", "attention", "mixed", "sum", "gated"]
OVERALL_ONLY: Mapping[str, float] = MappingProxyType({"overall": 1.0})
LOWEST_LOGPROB, LOGPROB_SHIFT = -8.0, 1.0
MOST_LOG_VARIANCE = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """What a head is, beside its weights.

    Attributes:
        kind: how token values become a score.
        criteria: what is scored, and the weight of each criterion in the one score that a policy is given.
        spread: whether the head gives a variance beside each score.
        alpha: share of the last token for `mixed`; None where it is learned.
        pessimism: standard deviations taken off the score; needs `spread`.
    """

    kind: Head
    criteria: Mapping[str, float] = field(default_factory=lambda: dict(OVERALL_ONLY))
    spread: bool = False
    alpha: float | None = None
    pessimism: float = 0.0


def describe_head(spec: HeadSpec) -> dict[str, Any]:
    """The JSON form of a head; what is as in a plain head is left out, so that such a folder reads as it always did."""
    plain = asdict(HeadSpec(kind=spec.kind))
    described = {key: value for key, value in asdict(spec).items() if value != plain[key]}
    if "criteria" in described:
        described["criteria"] = [list(item) for item in spec.criteria.items()]  # a JSON object would lose their order
    return described | {"head": spec.kind}


def why_not_linear(spec: HeadSpec) -> str | None:
    """Why a head's score is no linear map of the last token's state; None where it is one."""
    if spec.spread and spec.pessimism:
        return "its score takes deviations off, which are no linear map of a state"
    if spec.kind == "last" or (spec.kind == "mixed" and spec.alpha == 1.0):
        return None
    read = "log-probabilities too" if spec.kind == "gated" else "every token of a response"
    return f"its head {spec.kind!r} reads {read}, and a sequence classifier the last token's state alone"


def read_head(described: Mapping[str, Any], path: Path) -> HeadSpec:
    """The head that `describe_head` described; `path` is named where it cannot be read.

    Raises:
        ConfigError: there is no such head.
    """
    kind = described.get("head", "")
    if kind not in get_args(Head):
        raise ConfigError(f"{path}: head: {kind!r} is none. Fix: one of {', '.join(get_args(Head))}")
    more = {key: described[key] for key in ("spread", "alpha", "pessimism") if key in described}
    criteria = described.get("criteria", list(OVERALL_ONLY.items()))
    return HeadSpec(kind=kind, criteria=dict(criteria), **more)


class ScoreHead(nn.Module):
    """One scalar a criterion over the states of a response.

    Attributes:
        scalar: values of a token, one a criterion (two for `gated`).
        query_CD: what `attention` looks for.
        mixing_C: logit of alpha where `mixed` learns it.
        log_variance: log-variance of each criterion's score, where the head has one; it starts at 0. Read at the
            last token for `last`, else from the mean state.
    """

    weights_C: Tensor

    def __init__(self, spec: HeadSpec, hidden_size: int) -> None:
        super().__init__()
        count = len(spec.criteria)
        self.spec = spec
        self.scalar = nn.Linear(hidden_size, 2 * count if spec.kind == "gated" else count)
        learns_alpha = spec.kind == "mixed" and spec.alpha is None
        self.query_CD = nn.Parameter(torch.zeros(count, hidden_size)) if spec.kind == "attention" else None
        self.mixing_C = nn.Parameter(torch.zeros(count)) if learns_alpha else None
        self.log_variance = nn.Linear(hidden_size, count) if spec.spread else None
        self.register_buffer("weights_C", torch.tensor(list(spec.criteria.values())), persistent=False)

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Give the head the weights it starts from.

        The scalar starts with standard deviation 1 / sqrt(D + 1) and no bias (Stiennon et al. 2020); that of `gated`
        starts at zero, so that the first gradient says which way log-probabilities count.
        """
        if self.spec.kind == "gated":
            self.scalar.weight.zero_()
        else:
            generator = torch.Generator().manual_seed(seed)
            spread = (self.scalar.in_features + 1) ** -0.5
            self.scalar.weight.copy_(torch.randn(self.scalar.weight.shape, generator=generator) * spread)
        self.scalar.bias.zero_()
        if self.log_variance is not None:
            self.log_variance.weight.zero_()
            self.log_variance.bias.zero_()

    def forward(self, states_BCD: Tensor, mask_BR: Tensor, logprobs_BR: Tensor | None = None) -> Tensor:
        """Score of each criterion, scores_BC, float32.

        Args:
            states_BCD: hidden states at the last prompt token and at each response token, [B, R + 1, D]; for `last`
                the state of each row's last token is enough, [B, 1, D].
            mask_BR: 1 for response tokens.
            logprobs_BR: of the response tokens under the body; `gated` needs them.
        """
        if self.spec.kind == "last":
            return self._scalar(_last_state(states_BCD, mask_BR))
        values_BRC = self.token_values(states_BCD, mask_BR, logprobs_BR)
        total_BC = values_BRC.sum(1)
        match self.spec.kind:
            case "mean":
                return total_BC / _lengths(mask_BR)
            case "mixed":
                last_BC = self._scalar(_last_state(states_BCD, mask_BR))
                return torch.lerp(total_BC / _lengths(mask_BR), last_BC, self._alpha())
            case "attention" if self.query_CD is not None:
                return (attention(states_BCD, mask_BR, self.query_CD) * values_BRC).sum(1)
        return total_BC

    def token_values(self, states_BCD: Tensor, mask_BR: Tensor, logprobs_BR: Tensor | None = None) -> Tensor:
        """Value of each response token for each criterion, values_BRC, float32; padding has 0."""
        values_BRC = self._scalar(states_BCD[:, 1:])
        if self.spec.kind == "gated":
            if logprobs_BR is None:
                raise ValueError("head 'gated' needs the log-probabilities of the response tokens")
            gate_BR1 = (logprobs_BR.clamp_min(LOWEST_LOGPROB) + LOGPROB_SHIFT)[..., None]
            values_BRC = values_BRC[..., 0::2] + values_BRC[..., 1::2] * gate_BR1
        return values_BRC.masked_fill(mask_BR[..., None] == 0, 0.0)

    def log_variances(self, states_BCD: Tensor, mask_BR: Tensor) -> Tensor:
        """Log-variance of each criterion's score, log_variances_BC, float32, within ±8.

        Raises:
            ValueError: the head gives no variance.
        """
        if self.log_variance is None:
            raise ValueError("this head gives scores without a variance")
        pool = _last_state if self.spec.kind == "last" else mean_state
        state_BD = pool(states_BCD, mask_BR).to(self.log_variance.weight.dtype)
        return self.log_variance(state_BD).float().clamp(-MOST_LOG_VARIANCE, MOST_LOG_VARIANCE)

    def combine(self, scores_BC: Tensor) -> Tensor:
        """The weighted sum over criteria, scores_B."""
        return (scores_BC * self.weights_C).sum(1)

    def combined_deviation(self, log_variances_BC: Tensor) -> Tensor:
        """Standard deviation of the weighted sum of independent scores, deviation_B."""
        return (log_variances_BC.exp() * self.weights_C.square()).sum(1).sqrt()

    def _scalar(self, states: Tensor) -> Tensor:
        """The linear part, in the weights' precision whatever that of the states; float32."""
        return self.scalar(states.to(self.scalar.weight.dtype)).float()

    def _alpha(self) -> Tensor:
        if self.mixing_C is not None:
            return torch.sigmoid(self.mixing_C)
        return torch.full_like(self.weights_C, float(self.spec.alpha or 0.0))


def attention(states_BCD: Tensor, mask_BR: Tensor, query_CD: Tensor) -> Tensor:
    """Weight of each response token for each query, attention_BRC; they sum to 1 over a response that has tokens."""
    logits_BRC = (states_BCD[:, 1:].to(query_CD.dtype) @ query_CD.t()).float() * query_CD.shape[1] ** -0.5
    padding_BR1 = mask_BR[..., None] == 0
    lowest = torch.finfo(logits_BRC.dtype).min
    return torch.softmax(logits_BRC.masked_fill(padding_BR1, lowest), 1).masked_fill(padding_BR1, 0.0)


def mean_state(states_BCD: Tensor, mask_BR: Tensor) -> Tensor:
    """Mean hidden state over each response's tokens, state_BD."""
    return (states_BCD[:, 1:] * mask_BR[..., None]).sum(1) / _lengths(mask_BR)


def _last_state(states_BCD: Tensor, mask_BR: Tensor) -> Tensor:
    """State at each response's last token, found from the mask; of an empty response, at the last prompt token."""
    last_B = mask_BR.sum(1).long().clamp_max(states_BCD.shape[1] - 1)
    return states_BCD[torch.arange(len(last_B), device=last_B.device), last_B]


def _lengths(mask_BR: Tensor) -> Tensor:
    return mask_BR.sum(1, keepdim=True).clamp_min(1.0)
