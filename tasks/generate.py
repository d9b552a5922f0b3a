"""Stage `generate`: sample responses from the SFT model, to be labelled.

Reads artifacts/validate/prompts.parquet and heldout_prompts.parquet, artifacts/sft/model. Writes responses.parquet:
`generate.responses_per_prompt` rows a prompt, with the log-probability of every sampled token. The temperatures are
used in turn over the responses of a prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.data.records import prompt_id
from rlhf_core.models.policy import eos_token_ids, load_policy
from rlhf_core.models.tokenizer import decode_response, encode_prompts, load_tokenizer
from rlhf_core.rollout.sampler import sample_responses
from tasks import paths
from tasks.stage import Stage
from tasks.tables import SCHEMAS, read_table, write_table

Row = Mapping[str, Any]


def run(stage: Stage) -> dict[str, Any]:
    """Sample and write; returns the figures of `reports/metrics/generate.json`."""
    prompts = _prompts(stage)
    rows = _sample(stage, prompts) if prompts else []
    write_table(stage.out / "responses.parquet", rows, SCHEMAS["responses"])
    return _figures(rows, len(prompts))


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


def _sample(stage: Stage, prompts: Sequence[dict[str, str]]) -> list[Row]:
    """One round a response number; rows come out by prompt and then by number."""
    cfg, limits = stage.params.generate, stage.params.model
    folder = stage.root / paths.SFT / "model"
    model, tokenizer = load_policy(folder).to(stage.device), load_tokenizer(folder)
    encoded = encode_prompts(tokenizer, [row["prompt"] for row in prompts], limits.max_prompt_tokens)
    rng, tokens = stage.rng(), 0
    rows: list[tuple[int, Row]] = []
    for number in range(cfg.responses_per_prompt):
        temperature = cfg.temperatures[number % len(cfg.temperatures)]
        samples = sample_responses(
            model,
            encoded,
            max_new_tokens=limits.max_response_tokens,
            temperature=temperature,
            generator=rng(f"sample/{number}"),
            eos_ids=eos_token_ids(model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            batch_size=cfg.batch_size,
        )
        sampled = zip(samples.response_ids, samples.logprobs, samples.finished, strict=True)
        for place, (ids, logprobs, finished) in enumerate(sampled):
            row = {
                **prompts[place],
                "prompt_id": prompt_id(prompts[place]["prompt"]),
                "sample": number,
                "temperature": temperature,
                "response": decode_response(tokenizer, ids),
                "response_ids": ids,
                "logprobs": logprobs,
                "finished": finished,
            }
            rows.append((place, row))
            tokens += len(ids)
        stage.log(number + 1, cfg.responses_per_prompt, {"rollout/responses": float(len(rows))}, tokens)
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _figures(rows: Sequence[Row], num_prompts: int) -> dict[str, Any]:
    """Headline figures; null where nothing was sampled.

    `distinct_share` is the share of a prompt's responses that differ in text, `mean_logprob` nats a token.
    """
    if not rows:
        unknown = dict.fromkeys(("mean_tokens", "finished_share", "distinct_share", "mean_logprob"))
        return {"num_responses": 0, **unknown}
    num_tokens = sum(len(row["response_ids"]) for row in rows)
    each = len(rows) // num_prompts
    distinct = sum(len({row["response"] for row in rows[start : start + each]}) for start in range(0, len(rows), each))
    return {
        "num_responses": len(rows),
        "mean_tokens": num_tokens / len(rows),
        "finished_share": sum(row["finished"] for row in rows) / len(rows),
        "distinct_share": distinct / len(rows),
        "mean_logprob": sum(sum(row["logprobs"]) for row in rows) / num_tokens,
    }
