"""What the stage `align` holds and does: DPO and its relatives, PPO and its relatives, chains of them."""

import math
from dataclasses import dataclass

from rlhf_core.config import DPOConfig, PPOConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.planning import rows
from rlhf_core.planning.activations import FLOAT, Reading, kept_bytes, output_gradient_bytes, passing_bytes
from rlhf_core.planning.parts import (
    KEPT_CHECKPOINTS,
    Footprint,
    Moment,
    Passes,
    Planned,
    sampler,
    scoring,
    training,
    with_holes,
)
from rlhf_core.planning.workload import mean

MEASURED_PROMPTS = 256
"""That of the stage: prompts that both models answer when training is over. A test holds them equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Link:
    """An algorithm of the stage; `held` is what stays in memory after it, weights and AdamW's moments."""

    held: int
    trained: int
    moments: tuple[Moment, ...]
    work: tuple[Passes, ...]
    texts: int
    steps: int


def align(planned: Planned, item: str) -> Footprint:
    """The footprint of `align@<item>`."""
    settings, shape = planned.params.align, planned.shape
    if item == "chain":
        configs = [getattr(settings.chain, link) for link in settings.chain.links]
    else:
        configs = [settings.ppo if item == "ppo" else settings.dpo]
    links = [_ppo(planned, cfg) if isinstance(cfg, PPOConfig) else _dpo(planned, cfg) for cfg in configs]
    moments, work = _measured(planned, max(link.held for link in links))
    lora, trained = planned.params.model.lora_at("align"), max(link.trained for link in links)
    return Footprint(
        parameters=shape.parameters,
        trained=trained,
        moments=(*(moment for link in links for moment in link.moments), *moments),
        work=(*(one for link in links for one in link.work), *work),
        texts=sum(link.texts for link in links) + planned.workload.prompts,
        written=(shape.parameters + (shape.adapter_parameters(lora) if lora else 0)) * FLOAT,
        checkpoints=KEPT_CHECKPOINTS * 3 * trained * FLOAT,
        steps=sum(link.steps for link in links),
    )


def _frozen(planned: Planned, lora: LoraConfig | None) -> int:
    """Bytes of policy, reference and reward model; under adapters the policy is its own reference."""
    return ((1 if lora else 2) * planned.shape.parameters + planned.shape.body_parameters) * FLOAT


def _dpo(planned: Planned, cfg: DPOConfig) -> _Link:
    work, shape, lora = planned.workload, planned.shape, planned.params.model.lora_at("align")
    settings, trained = planned.settings(lora), planned.trained(lora, shape.parameters)
    held = _frozen(planned, lora) + 2 * trained * FLOAT
    step = rows.groups(work.group_lengths, min(cfg.prompts_per_step, work.groups), logprobs=True)
    micro = step.cut(cfg.prompts_per_forward, None)
    steps = cfg.epochs * math.ceil(work.groups / cfg.prompts_per_step)
    tokens = work.groups * mean([sum(one) for one in work.group_lengths])
    responses = work.groups * mean([sum(one[1:]) for one in work.group_lengths])
    return _Link(
        held=held,
        trained=trained,
        moments=(
            *training(held, trained, micro.reading, settings, shape, several=micro.several),
            Moment("reference", held + passing_bytes(shape, micro.reading, settings)),
        ),
        work=(
            Passes("read", tokens, responses),
            Passes("train", cfg.epochs * tokens, cfg.epochs * responses, steps),
        ),
        texts=3 * work.pairs,
        steps=steps,
    )


def _ppo(planned: Planned, cfg: PPOConfig) -> _Link:
    shape, lora = planned.shape, planned.params.model.lora_at("align")
    settings, trained = planned.settings(lora), planned.trained(lora, shape.parameters)
    separate = cfg.has_value_model and cfg.value.model == "separate"
    value = planned.trained(lora, shape.body_parameters) if separate else 0
    held = _frozen(planned, lora) + (shape.body_parameters * FLOAT if separate else 0) + 2 * (trained + value) * FLOAT
    passing = min(cfg.microbatch or cfg.minibatch, cfg.minibatch)
    reading = _minibatch(planned, cfg, passing)
    gradients = (trained + value) * FLOAT if passing < cfg.minibatch else 0
    output = output_gradient_bytes(shape, reading, settings)
    kept = with_holes(kept_bytes(shape, reading, settings), shape, reading, settings)
    moments = [
        Moment("rollout", held + sampler(planned, cfg.rollout_batch)),
        Moment("looking at the rollout", held + passing_bytes(shape, reading, settings)),
        Moment("policy step", held + gradients + kept + output),
        Moment("end of the step", held + (trained + value) * FLOAT + output),
    ]
    if separate:  # its step comes when the policy's graph is gone and its gradient is there
        kept = kept_bytes(shape, reading._replace(responses=0), settings)
        kept = with_holes(kept, shape, reading, settings)
        moments.append(Moment("value step", held + max(gradients, trained * FLOAT) + kept + output // 2))
    return _Link(
        held=held,
        trained=trained + value,
        moments=tuple(moments),
        work=_rollouts(planned, cfg, separate=separate),
        texts=planned.workload.prompts,
        steps=cfg.steps,
    )


def _minibatch(planned: Planned, cfg: PPOConfig, passing: int) -> Reading:
    """What goes through policy and value model together; minibatches are dealt at random, so their sums vary little."""
    prompts, new = planned.workload.prompt_lengths, 1.1 * planned.new_tokens
    written = round(passing * min(new, planned.params.model.max_response_tokens))
    distinct = max(1, passing // cfg.responses_per_prompt)
    return Reading(round(distinct * 1.1 * mean(prompts)) + written, written, written)


def _rollouts(planned: Planned, cfg: PPOConfig, *, separate: bool) -> tuple[Passes, ...]:
    """All rollouts: written, read by policy, reference, reward and value model, and learned from `epochs` times."""
    rows_each, prompt, new = cfg.rollout_batch + cfg.replay.rows, planned.prompt, planned.new_tokens
    drawn = cfg.steps * rows_each * new
    tokens = cfg.steps * rows_each * prompt / cfg.responses_per_prompt + drawn
    updates = cfg.steps * cfg.epochs * math.ceil(rows_each / cfg.minibatch)
    value = [Passes("train_scores", cfg.epochs * tokens, 0, updates)] if separate else []
    written = cfg.steps * cfg.rollout_batch
    return (
        Passes("sample", written * prompt / cfg.responses_per_prompt, written * new),
        Passes("read", 2 * tokens, 2 * drawn),
        Passes("read_scores", (1 + separate) * tokens, 0),
        Passes("train", cfg.epochs * tokens, cfg.epochs * drawn, updates),
        *value,
    )


def _measured(planned: Planned, held: int) -> tuple[list[Moment], list[Passes]]:
    """What is done when training is over: both models write to the same prompts, and what they write is scored."""
    settings = planned.settings(planned.params.model.lora_at("align"))
    count, new = min(MEASURED_PROMPTS, planned.workload.prompts), planned.new_tokens
    reading = rows.written(planned.workload.prompt_lengths, new, min(count, planned.scored_rows)).reading
    moments = [
        Moment("measuring", held + sampler(planned, min(count, planned.sampled_rows))),
        Moment("scoring", held + scoring(planned, reading, settings)),
    ]
    if settings.rank:
        moments.append(Moment("saving", held + planned.shape.parameters * FLOAT))
    tokens = 2 * count * (planned.prompt + new)
    work = [
        Passes("sample", 2 * count * planned.prompt, 2 * count * new),
        Passes("read_scores", tokens, 0),
        Passes("read", tokens, 2 * count * new),
    ]
    return moments, work
