"""The kinds of work that a probe measures, each by the functions that the stages call."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_core.config import RewardConfig, SFTConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.data.batching.pairs import PreferenceGroup
from rlhf_core.evaluation.policy_measurement import response_logprob_sums
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.planning.probe import ProbeRequest
from rlhf_core.rollout.sampler import Sampling, sample_rows
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import train_sft

PAD = 0
MOST_STEPS = 4
SAMPLED_TOKENS = (1, 9)
"""Two lengths of responses: their difference is what so many steps of decoding take."""


class Taken(NamedTuple):
    """Seconds of a pass over the rows, of those the optimiser's, and of a decoding step; see `probe.Work`."""

    seconds: float
    update_s: float = 0.0
    step_s: float = 0.0


def _device(request: ProbeRequest) -> torch.device:

    on_gpu = request.compute.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def made_model(request: ProbeRequest, depth: int) -> PreTrainedModel:
    """A model of random weights with so many layers, in evaluation mode."""

    if request.folder is None:
        cfg = request.model.model_copy(update={"layers": depth, "source": "config"})
        return build_policy(cfg, request.vocabulary, PAD, 1, 0).to(_device(request))

    config = AutoConfig.from_pretrained(request.folder, local_files_only=True, trust_remote_code=False)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    return model.to(_device(request))


def _adapted(request: ProbeRequest, model: Any) -> None:

    add_adapters(model, request.lora, 0)


def _words(request: ProbeRequest, length: int, first: int) -> list[int]:
    """Tokens of a row; which they are does not matter."""
    return [2 + (first + place) % max(1, request.vocabulary - 2) for place in range(length)]


def _train_policy(request: ProbeRequest, model: PreTrainedModel) -> Taken:

    _adapted(request, model)
    optimizer = make_optimizer(model, 1e-9)
    rows = [
        Example(_words(request, prompt, 7 * number), _words(request, response, 11 * number))
        for number, (prompt, response) in enumerate(request.rows)
    ]
    clock = _Steps(request, optimizer)
    cfg = SFTConfig(max_steps=MOST_STEPS, batch_size=len(rows), save_every=10**9)
    state = TrainState(modules={"policy": model}, optimizers={"policy": optimizer})
    with clock:
        train_sft(cfg, state, rows, [], RunContext(seed=0, pad_id=PAD, log=clock))
    return clock.result()


def _train_scores(request: ProbeRequest, model: PreTrainedModel) -> Taken:

    scorer = RewardModel.from_policy(model, "last", seed=0)
    _adapted(request, scorer.body)
    optimizer = make_optimizer(scorer, 1e-9)
    groups = [
        PreferenceGroup(
            prompt=_words(request, prompt, 7 * number),
            responses=[_words(request, response, 11 * number), _words(request, response, 13 * number + 1)],
            pairs=[(0, 1)],
        )
        for number, (prompt, response) in enumerate(request.rows[::2])
    ]
    clock = _Steps(request, optimizer)
    cfg = RewardConfig(epochs=MOST_STEPS, prompts_per_step=len(groups), save_every=10**9)
    state = TrainState(modules={"reward": scorer}, optimizers={"reward": optimizer})
    with clock:
        train_reward(cfg, state, groups, RunContext(seed=0, pad_id=PAD, log=clock))
    return clock.result()


def _read(request: ProbeRequest, model: PreTrainedModel) -> Taken:

    prompts, responses = _texts(request)
    _adapted(request, model)
    return Taken(_timed(request, lambda: response_logprob_sums(model, prompts, responses, pad_id=PAD)))


def _read_scores(request: ProbeRequest, model: PreTrainedModel) -> Taken:

    prompts, responses = _texts(request)
    scorer = RewardModel.from_policy(model, "last", seed=0)
    return Taken(_timed(request, lambda: reward_scores(scorer, prompts, responses, pad_id=PAD)))


def _sample(request: ProbeRequest, model: PreTrainedModel) -> Taken:

    prompts = [_words(request, length, number) for number, length in enumerate(request.sampled)]

    def sample(count: int) -> Callable[[], object]:
        uniform_NT = torch.rand(len(prompts), count, generator=torch.Generator().manual_seed(0))
        sampling = Sampling(eos_ids=(), pad_id=PAD, max_new_tokens=count)
        return lambda: sample_rows(model, prompts, uniform_NT, sampling, temperature=1.0, batch_size=len(prompts))

    short, long = (_timed(request, sample(count)) for count in SAMPLED_TOKENS)
    step_s = max(0.0, long - short) / (SAMPLED_TOKENS[1] - SAMPLED_TOKENS[0])
    return Taken(max(0.0, short - step_s), step_s=step_s)


def _texts(request: ProbeRequest) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [_words(request, prompt, 7 * number) for number, (prompt, _) in enumerate(request.rows)]
    return prompts, [_words(request, response, 11 * number) for number, (_, response) in enumerate(request.rows)]


def _timed(request: ProbeRequest, work: Callable[[], object]) -> float:
    """Seconds that something takes once it has been done before: the least of a few."""
    work()
    found, begun = list[float](), _now(request)
    while len(found) < MOST_STEPS and (not found or _now(request) - begun < request.seconds):
        start = _now(request)
        work()
        found.append(_now(request) - start)
    return min(found)


class _Enough(Exception):
    """As many steps as there was time for."""


class _Steps:
    """A `MetricSink` that times steps and, of them, the optimiser; ends training once there was time enough."""

    def __init__(self, request: ProbeRequest, optimizer: torch.optim.Optimizer) -> None:
        self.request, self.steps, self.updates, self._pending = request, list[float](), list[float](), 0.0
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        self._begun = self._mark = _now(request)

    def _before(self, *_: object) -> None:
        self._pending = _now(self.request)

    def _after(self, *_: object) -> None:
        self._pending = _now(self.request) - self._pending

    def __call__(self, step: int, total: int, metrics: object, tokens: int) -> None:
        self.steps.append(_now(self.request) - self._mark)
        self.updates.append(self._pending)
        if len(self.steps) > 1 and _now(self.request) - self._begun > self.request.seconds:
            raise _Enough
        self._mark = _now(self.request)

    def __enter__(self) -> "_Steps":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        return kind is _Enough

    def result(self) -> Taken:
        """The least of the steps after the first, which makes what is kept, and the least of the updates."""
        return Taken(min(self.steps[1:]), min(self.updates[1:]))


def _now(request: ProbeRequest) -> float:
    """CPU seconds of this process, which others on the machine do not lengthen; on a GPU the clock, once it is idle."""

    if request.compute.device != "cpu" and torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / request.compute.threads


KINDS: Mapping[str, Callable[[ProbeRequest, PreTrainedModel], Taken]] = {
    "train": _train_policy,
    "train_scores": _train_scores,
    "read": _read,
    "read_scores": _read_scores,
    "sample": _sample,
}
"""The kinds of `rlhf_core.planning.parts.Passes`."""
