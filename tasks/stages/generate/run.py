"""Stage `generate`: sample responses from the SFT model and others, to be labelled.

Reads artifacts/validate/prompts.parquet and heldout_prompts.parquet, artifacts/sft/model, and what `generate` names
under models/. Writes responses.parquet: `generate.responses_per_prompt` rows a prompt, with the log-probabilities of
every sampled token and, where a scorer picked among several candidates, the score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_core.rollout.best_of_n import kl_bound, num_candidates, pick
from rlhf_core.rollout.sampler import sample_rows
from rlhf_core.rollout.token_draw import CutOff
from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.identity import prompt_id
from rlhf_core.text.tokenizer import decode_response, encode_prompts
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.generate.candidates import SampleSpec, Source, load_source, plan, score_candidates
from tasks.stages.texts import count_texts, text_figures, warn_of_texts
from tasks.tables import SCHEMAS, read_table, write_table

Row = dict[str, Any]


def run(stage: Stage) -> dict[str, Any]:
    """Sample and write; returns the figures of `reports/metrics/generate.json`."""
    prompts = _prompts(stage)
    by_prompt = _sample(stage, prompts) if prompts else []
    figures: dict[str, Any] = {}
    if prompts and stage.params.generate.best_of.candidates > 1:
        by_prompt, figures = _pick(stage, prompts, by_prompt)
    rows = [{**row, "sample": number} for rows in by_prompt for number, row in enumerate(rows)]
    write_table(stage.out / "responses.parquet", rows, SCHEMAS["responses"])
    warn_of_texts(stage)
    return _figures(rows, len(prompts)) | figures | text_figures(stage)


def _prompts(stage: Stage) -> list[dict[str, str]]:
    """The prompts that get responses, each with its split."""
    cfg = stage.params.generate
    chosen = []
    for split, name, count in (
        ("train", "prompts", cfg.num_prompts),
        ("heldout", "heldout_prompts", cfg.num_heldout_prompts),
    ):
        table = read_table(stage.root / paths.VALIDATE / f"{name}.parquet")
        first = table.select(range(min(count, len(table))))
        chosen += [{"prompt": row["prompt"], "task": row["task"], "split": split} for row in first]
    return chosen


def _sample(stage: Stage, prompts: Sequence[dict[str, str]]) -> list[list[Row]]:
    """All candidates of each prompt, by number. One model after the other is in memory."""
    cfg = stage.params.generate
    candidates = plan(cfg, num_candidates(cfg.responses_per_prompt, cfg.best_of.candidates, cfg.best_of.keep))
    uniform = [
        torch.rand(len(prompts), stage.params.model.max_response_tokens, generator=stage.rng()(f"sample/{number}"))
        for number in range(len(candidates))
    ]
    uniform_CNT = torch.stack(uniform)  # a candidate's numbers, whichever model it comes from
    by_prompt: list[list[Row]] = [[{}] * len(candidates) for _ in prompts]
    starts = range(0, len(prompts), cfg.batch_size)
    names = list(dict.fromkeys(candidate.model for candidate in candidates))
    done = tokens = 0
    for name in names:
        source, counts = load_source(stage, name), count_texts(stage, f"prompts for {name}")
        own = [candidate for candidate in candidates if candidate.model == name]
        for start in starts:
            part = slice(start, start + cfg.batch_size)
            for place, candidate, row in _sample_part(stage, source, prompts[part], own, uniform_CNT[:, part], counts):
                by_prompt[start + place][candidate.number] = row
                tokens += len(row["response_ids"])
                done += 1
            step, total = names.index(name) * len(starts) + start // cfg.batch_size + 1, len(names) * len(starts)
            stage.log(step, total, {"rollout/responses": float(done)}, tokens)
    return by_prompt


def _sample_part(
    stage: Stage,
    source: Source,
    prompts: Sequence[dict[str, str]],
    candidates: Sequence[SampleSpec],
    uniform_CNT: torch.Tensor,
    counts: TextCounts,
) -> list[tuple[int, SampleSpec, Row]]:
    """One model's candidates for some prompts: place of the prompt, which candidate, row."""
    cfg, limits = stage.params.generate, stage.params.model
    encoded = encode_prompts(source.tokenizer, [row["prompt"] for row in prompts], limits.max_prompt_tokens, counts)
    wanted = [(place, candidate) for candidate in candidates for place in range(len(prompts))]
    samples = sample_rows(
        source.model,
        [encoded[place] for place, _ in wanted],
        uniform_CNT[[candidate.number for candidate in candidates]].flatten(0, 1),
        source.sampling,
        temperature=[candidate.temperature for _, candidate in wanted],
        batch_size=cfg.batch_size,
        cut_off=CutOff(top_k=cfg.top_k, top_p=cfg.top_p),
    )
    rows = []
    for number, (place, candidate) in enumerate(wanted):
        ids = samples.response_ids[number]
        row = {
            **prompts[place],
            "prompt_id": prompt_id(prompts[place]["prompt"]),
            "model": candidate.model,
            "temperature": candidate.temperature,
            "response": decode_response(source.tokenizer, ids),
            "response_ids": ids,
            "logprobs": samples.logprobs[number],
            "behaviour_logprobs": samples.behaviour_logprobs[number],
            "finished": samples.finished[number],
            "score": None,
        }
        rows.append((place, candidate, row))
    return rows


def _pick(
    stage: Stage, prompts: Sequence[dict[str, str]], by_prompt: Sequence[list[Row]]
) -> tuple[list[list[Row]], dict[str, Any]]:
    """The candidates that the scorer keeps, and what the picking did."""
    cfg = stage.params.generate.best_of
    flat = [row for rows in by_prompt for row in rows]
    scores = score_candidates(stage, [row["prompt"] for row in flat], flat)
    scores_NC = torch.tensor(scores, dtype=torch.float64).view(len(prompts), -1)
    kept_NK = pick(scores_NC, cfg.candidates, cfg.keep)
    kept = [
        [{**rows[index], "score": scores_NC[place, index].item()} for index in kept_NK[place].tolist()]
        for place, rows in enumerate(by_prompt)
    ]
    best_NP = kept_NK if cfg.keep == "best" else kept_NK[:, ::2]
    return kept, {
        "best_of_kl_bound": kl_bound(cfg.candidates),
        "candidates_score": scores_NC.mean().item(),
        "best_score": scores_NC.gather(1, best_NP).mean().item(),
    }


def _figures(rows: Sequence[Mapping[str, Any]], num_prompts: int) -> dict[str, Any]:
    """Headline figures; null where nothing was sampled.

    `distinct_share_within` is the share of a prompt's responses that differ in text, `mean_logprob` nats a token.
    """
    if not rows:
        unknown = dict.fromkeys(("response_tokens", "finished_share", "distinct_share_within", "mean_logprob"))
        return {"num_responses": 0, **unknown}
    num_tokens = sum(len(row["response_ids"]) for row in rows)
    each = len(rows) // num_prompts
    distinct = sum(len({row["response"] for row in rows[start : start + each]}) for start in range(0, len(rows), each))
    return {
        "num_responses": len(rows),
        "response_tokens": num_tokens / len(rows),
        "finished_share": sum(row["finished"] for row in rows) / len(rows),
        "distinct_share_within": distinct / len(rows),
        "mean_logprob": sum(sum(row["logprobs"]) for row in rows) / num_tokens,
    }
