"""What each stage holds and does: the moments of its memory, the work of its passes, what it leaves on disk.

A stage's peak is the largest of its moments. Each is a sum of weights, gradients, moments of AdamW (two a trained
number) and what a pass keeps; the sums follow the bodies in `tasks/stages`. All bytes are of one process.
"""

import math
from collections.abc import Callable, Mapping

from rlhf_core.planning import rows
from rlhf_core.planning.activations import FLOAT, passing_bytes
from rlhf_core.planning.alignment import align
from rlhf_core.planning.parts import (
    CPU_PASS_TOKENS,
    KEPT_CHECKPOINTS,
    NARROW_ROWS,
    TOKEN_BYTES,
    Footprint,
    Moment,
    Passes,
    Planned,
    sampler,
    scoring,
    training,
)
from rlhf_core.planning.workload import mean

STANDARDISED_GROUPS, SHOWN_PROMPTS = 500, 8
"""Of the stages reward and sft: what they read or write beside training. A test holds them equal."""


def footprint(planned: Planned, stage: str) -> Footprint:
    """What `sft` or `align@ppo` takes; a stage without models takes nothing beside its process."""
    name, _, item = stage.partition("@")
    make = FOOTPRINTS.get(name)
    return make(planned, item) if make else Footprint()


def _sft(planned: Planned, item: str) -> Footprint:
    cfg, work, shape = planned.params.sft, planned.workload, planned.shape
    lora = planned.params.model.lora_at("sft")
    settings, weights = planned.settings(lora), shape.parameters * FLOAT
    trained, lengths = planned.trained(lora, shape.parameters), work.demonstration_lengths
    batch = min(cfg.batch_size, work.demonstrations)
    step = rows.examples(lengths, batch)
    micro = step.cut(math.ceil(batch / cfg.accumulation), CPU_PASS_TOKENS if settings.cpu else None)
    held = weights + (3 if work.kept else 2) * trained * FLOAT  # two moments, and the best weights so far
    learned, read = cfg.max_steps * batch, (cfg.max_steps // cfg.eval_every + 2) * work.kept
    tokens, responses = mean([sum(one) for one in lengths]), mean([one for _, one in lengths])
    return Footprint(
        parameters=shape.parameters,
        trained=trained,
        moments=(
            Moment("loading", (2 if planned.params.model.source == "folder" else 1) * weights),
            *training(held, trained, micro.reading, settings, shape, several=micro.several),
            Moment("held-out loss", held + passing_bytes(shape, step.reading, settings)),
            Moment("samples", held + sampler(planned, min(SHOWN_PROMPTS, work.kept))),
            *([Moment("saving", held + weights)] if lora else []),
        ),
        work=(
            Passes("train", learned * tokens, learned * responses, cfg.max_steps),
            Passes("read", read * tokens, read * responses),
        ),
        texts=2 * (work.demonstrations + work.kept),
        written=weights + trained * FLOAT * bool(lora),
        checkpoints=KEPT_CHECKPOINTS * (4 if work.kept else 3) * trained * FLOAT,
        steps=cfg.max_steps,
    )


def _reward(planned: Planned, item: str) -> Footprint:
    cfg, work, shape = planned.params.reward, planned.workload, planned.shape
    lora = planned.params.model.lora_at("reward")
    settings, body, lengths = planned.settings(lora), shape.body_parameters, work.group_lengths
    gated, last = cfg.head == "gated", cfg.head == "last"
    weights = (body + (shape.embedding_parameters if gated and not shape.tied else 0)) * FLOAT
    trained, members = planned.trained(lora, body), cfg.ensemble.members + (cfg.ensemble.distill != "none")
    step = rows.groups(lengths, min(cfg.prompts_per_step, work.groups), logprobs=gated, last=last)
    micro = step.cut(cfg.prompts_per_forward, CPU_PASS_TOKENS if settings.cpu else None)
    held = members * weights + 2 * trained * FLOAT
    answers = mean([len(one) - 1 for one in lengths])
    distinct = answers * work.groups / max(1, work.pairs)  # responses for each pair: none is read twice
    judged = distinct * work.heldout_pairs + work.graded + answers * min(STANDARDISED_GROUPS, work.groups)
    scored = rows.responses_apart(lengths, planned.scored_rows, round(judged), logprobs=gated, last=last)
    steps = members * cfg.epochs * math.ceil(work.groups / cfg.prompts_per_step)
    learned = members * cfg.epochs * work.groups
    responses = mean([sum(one[1:]) for one in lengths])
    alone = members * judged * mean([one[0] + mean(one[1:]) for one in lengths])
    return Footprint(
        parameters=members * body,
        trained=trained,
        moments=(
            Moment("loading", 2 * shape.parameters * FLOAT + (members - 1) * weights),
            *training(held, trained, micro.reading, settings, shape, several=micro.several),
            Moment("scoring", held + scoring(planned, scored.reading, settings)),
            *([Moment("saving", held + weights)] if lora else []),
        ),
        work=(
            Passes(
                "train" if gated else "train_scores",
                learned * mean([sum(one) for one in lengths]),
                learned * responses,
                steps,
            ),
            Passes("read" if gated else "read_scores", alone, members * judged * responses / max(answers, 1)),
        ),
        texts=round(work.groups * (1 + answers) + 4 * work.heldout_pairs + 2 * work.graded),
        written=members * weights,
        checkpoints=KEPT_CHECKPOINTS * 3 * trained * FLOAT,
        steps=steps,
    )


def _generate(planned: Planned, item: str) -> Footprint:
    cfg, work = planned.params.generate, planned.workload
    prompts = min(cfg.num_prompts, work.prompts) + min(cfg.num_heldout_prompts, work.heldout_prompts)
    if not prompts:
        return Footprint()
    candidates = cfg.responses_per_prompt * cfg.best_of.candidates
    responses, weights = prompts * candidates, planned.shape.parameters * FLOAT
    drawn, tokens = responses * planned.new_tokens, prompts * planned.prompt
    held = weights + int(drawn * 2.5 * TOKEN_BYTES)  # a token, and its log-probability twice
    best = [Passes("read", tokens * candidates + drawn, drawn)] if cfg.best_of.candidates > 1 else []
    return Footprint(
        parameters=planned.shape.parameters,
        moments=(
            Moment("loading", 2 * weights),
            Moment("sampling", held + sampler(planned, min(cfg.batch_size, responses))),
        ),
        work=(Passes("sample", tokens, drawn), *best),
        texts=prompts,
        written=int(drawn * 12),
    )


def _evaluate(planned: Planned, item: str) -> Footprint:
    cfg, work, shape = planned.params.evaluate, planned.workload, planned.shape
    models, weights = 1 + len(planned.params.candidates), shape.parameters * FLOAT
    prompts, new, settings = min(cfg.num_prompts, work.heldout_prompts), planned.new_tokens, planned.settings(None)
    sets = models * len({*cfg.temperatures, 1.0})
    reading = rows.written(
        work.prompt_lengths, new, min(prompts, planned.params.compute.scored_rows or NARROW_ROWS)
    ).reading
    passing, each = scoring(planned, reading, settings), prompts * (planned.prompt + new)
    return Footprint(
        parameters=shape.parameters,
        moments=(
            Moment("loading", 2 * weights),
            Moment("sampling", weights + sampler(planned, min(prompts, planned.sampled_rows))),
            Moment("scoring", weights + shape.body_parameters * FLOAT + passing),
            Moment("divergence", 2 * weights + passing),
        ),
        work=(
            Passes("sample", sets * prompts * planned.prompt, sets * prompts * new),
            Passes("read_scores", sets * each, 0),
            Passes("read", (2 * models - 1) * each, (2 * models - 1) * prompts * new),
        ),
        texts=models * prompts,
        written=int(sets * each * 8),
    )


def _combine(planned: Planned, item: str) -> Footprint:
    cfg, weights = planned.params.combine, planned.shape.parameters * FLOAT
    members, new = len(cfg.members), planned.new_tokens
    count = min(cfg.pairs, planned.workload.heldout_pairs or planned.workload.heldout_prompts)
    reading = rows.written(planned.workload.prompt_lengths, new, min(count, NARROW_ROWS)).reading
    held = (members + 1) * weights
    times = math.comb(cfg.parts - 1, members - 1) if item == "weights" else members
    return Footprint(
        parameters=planned.shape.parameters * (1 if item == "weights" else members),
        moments=(
            Moment("loading", held),
            Moment("choosing", held + scoring(planned, reading, planned.settings(None))),
        ),
        work=(Passes("read", times * count * (planned.prompt + new), times * count * new),),
        texts=2 * count,
        written=weights * (1 if item == "weights" else members),
    )


FOOTPRINTS: Mapping[str, Callable[[Planned, str], Footprint]] = {
    "sft": _sft,
    "generate": _generate,
    "reward": _reward,
    "align": align,
    "combine": _combine,
    "evaluate": _evaluate,
}
"""The stages that run models, by their names in `dvc.yaml` without an item."""
