"""How well a reward model orders people's pairs, over folds by prompt: `python -m benchmarks.folds --run runs/NAME`.

A run that is done as far as stage `preferences` says which pairs there are and with which settings (`params.yaml`);
its own split is not used. Prompts go to folds by the hash of their dialogue. For each fold a reward model is trained on
the other folds, from the pretrained model and not from the run's SFT model, which has read replies of all of them, and
orders the pairs of the fold. Beside it stand the longer response and a logistic regression on the words of the two
responses, over the same folds.

Each fold runs in a process of its own and is kept under `--out`, so what was broken off goes on; the pooled figure has
Wilson's interval, widened for pairs that share a prompt.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_core.config import Params
from rlhf_core.data.batching.pairs import encode_pairs, group_pairs
from rlhf_core.data.cleaning.leakage import leaking_prompts
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.evaluation.reward_card import ScoredPairs, reward_card
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.policy import load_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.atomic import write_json
from rlhf_core.state.compute_mode import ComputeMode, set_compute_mode
from rlhf_core.state.host_memory import map_large_blocks
from rlhf_core.state.run_context import RunContext
from rlhf_core.text.identity import prompt_group
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, load_tokenizer
from rlhf_core.trainers.optimisation import fresh_state
from rlhf_core.trainers.reward.trainer import train_reward
from tasks import paths
from tasks.params import load_params
from tasks.tables import read_table

ROOT = Path(__file__).parents[1]
Row = Mapping[str, Any]


def fold_of(prompt: str, folds: int) -> int:
    """The fold of a prompt, which depends on its dialogue alone."""
    return int.from_bytes(hashlib.sha256(f"fold {prompt_group(prompt)}".encode()).digest()[:8]) % folds


def sides(rows: Sequence[Row], fold: int, folds: int, threshold: float) -> tuple[list[Row], list[Row]]:
    """Pairs to learn from and pairs of the fold; prompts that nearly are one of the fold's are not learned from."""
    held = [row for row in rows if fold_of(row["prompt"], folds) == fold]
    rest = [row for row in rows if fold_of(row["prompt"], folds) != fold]
    leaking = leaking_prompts((row["prompt"] for row in rest), [row["prompt"] for row in held], threshold)
    return [row for row in rest if row["prompt"] not in leaking], held


def pairs_of(run: Path) -> list[Row]:
    """All clean pairs of a run, in an order that does not depend on its split."""
    rows = [
        row
        for name in ("train", "heldout")
        for row in read_table(run / paths.PREFERENCES / f"{name}.parquet").to_list()
    ]
    return sorted(rows, key=lambda row: (row["prompt"], row["chosen"], row["rejected"]))


def model_margins(params: Params, folder: Path, train: Sequence[Row], held: Sequence[Row]) -> dict[str, Any]:
    """Margins of a reward model trained on `train`, and what it cost."""
    torch.set_num_threads(params.compute.threads)
    if params.machine.compact_memory:
        map_large_blocks()
    set_compute_mode(ComputeMode(precision=params.compute.precision))
    cfg, limits, tokenizer = params.reward, params.model, load_tokenizer(folder)
    reward = RewardModel.from_policy(load_policy(folder), cfg.head, params.seed)
    add_adapters(reward.body, params.model.lora_at("reward"), params.seed)
    groups = group_pairs(
        encode_pairs(
            tokenizer, train, max_prompt_tokens=limits.max_prompt_tokens, max_response_tokens=limits.max_response_tokens
        )
    )
    state = fresh_state({"reward": reward}, cfg.learning_rate, cfg.weight_decay)
    begun = time.process_time()
    train_reward(cfg, state, groups, RunContext(seed=params.seed, pad_id=tokenizer.pad_token_id, log=_say))
    trained, tokens = time.process_time() - begun, state.extra["tokens"]
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in held], limits.max_prompt_tokens)
    scores = [
        reward_scores(
            reward,
            prompts,
            encode_responses(tokenizer, [row[side] for row in held], limits.max_response_tokens),
            pad_id=tokenizer.pad_token_id,
            batch_size=8,
        )
        for side in ("chosen", "rejected")
    ]
    return {
        "chosen": scores[0],
        "rejected": scores[1],
        "training_cpu_seconds": trained,
        "scoring_cpu_seconds": time.process_time() - begun - trained,
        "training_tokens": tokens,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def word_margins(train: Sequence[Row], held: Sequence[Row]) -> list[float]:
    """Margins of a logistic regression on the difference of the two responses' TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(min_df=2, ngram_range=(1, 2), sublinear_tf=True)
    words.fit([row[side] for row in train for side in ("chosen", "rejected")])

    def differences(rows: Sequence[Row]) -> Any:
        return words.transform([row["chosen"] for row in rows]) - words.transform([row["rejected"] for row in rows])

    learned, signs = differences(train), np.where(np.arange(len(train)) % 2, 1.0, -1.0)
    fitted = LogisticRegression(C=1.0, max_iter=1000, fit_intercept=False)
    fitted.fit(learned.multiply(signs[:, None]).tocsr(), signs > 0)
    return list(fitted.decision_function(differences(held)))


def run_fold(options: argparse.Namespace, fold: int) -> None:
    """Train and judge one fold, and keep it."""
    params = load_params(options.run / "params.yaml")
    train, held = sides(pairs_of(options.run), fold, options.folds, params.preferences.leakage_threshold)
    folder = options.model or Path(params.model.path)
    found = model_margins(params, folder, train, held) | {
        "words": word_margins(train, held),
        "prompts": [prompt_group(row["prompt"]) for row in held],
        "chosen_chars": [len(row["chosen"]) for row in held],
        "rejected_chars": [len(row["rejected"]) for row in held],
        "num_train": len(train),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"fold-{fold}.json", found)


def card_of(found: Sequence[Row], *, words: bool = False) -> dict[str, Any]:
    """Figures of some folds together; `words`: of the regression on words."""
    column: dict[str, list[Any]] = {
        name: [value for fold in found for value in fold[name]]
        for name in ("chosen", "rejected", "words", "prompts", "chosen_chars", "rejected_chars")
    }
    chosen = column["words"] if words else column["chosen"]
    rejected = [0.0] * len(chosen) if words else column["rejected"]
    return reward_card(
        ScoredPairs(chosen, rejected, column["chosen_chars"], column["rejected_chars"], column["prompts"])
    )


def page(found: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| fold | pairs | reward model | words | longer | CPU minutes | tokens/CPU-s | peak MB |",
        "|---" * 8 + "|",
    ]
    for name, some in [*((str(n), [fold]) for n, fold in enumerate(found)), ("pooled", found)]:
        card, by_words = card_of(some), card_of(some, words=True)
        seconds = sum(fold["training_cpu_seconds"] for fold in some)
        cells = [
            name,
            card["num_heldout_pairs"],
            _share(card, "pairwise"),
            _share(by_words, "pairwise"),
            _share(card, "longer"),
        ]
        cells += [f"{seconds / 60:.1f}", f"{sum(fold['training_tokens'] for fold in some) / seconds:,.0f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{max(fold['peak_mb'] for fold in some):,.0f}"])) + " |")
    return "\n".join(lines)


def _share(card: Row, name: str) -> str:
    figure = f"{name}_accuracy"
    low, high = card[f"{figure}_low"], card[f"{figure}_high"]
    return f"{card[figure]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _say(step: int, total: int, figures: Mapping[str, float], tokens: int) -> None:
    if step % 10 == 0 or step == total:
        print(
            f"step {step} of {total}: loss {figures['loss/train']:.4f}, {tokens:,} tokens", file=sys.stderr, flush=True
        )


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folds", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that is done as far as preferences")
    parser.add_argument("--model", type=Path, help="pretrained folder; default: the run's model.path")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmarks/folds", help="where folds are kept")
    parser.add_argument("--fold", type=int, help="this one alone, in this process")
    options = parser.parse_args()
    if options.fold is not None:
        run_fold(options, options.fold)
        return
    for fold in range(options.folds):
        if not (options.out / f"fold-{fold}.json").exists():
            again = [sys.executable, "-m", "benchmarks.folds", *sys.argv[1:], "--fold", str(fold)]
            subprocess.run(again, cwd=ROOT, check=True)
    found = [json.loads((options.out / f"fold-{fold}.json").read_text()) for fold in range(options.folds)]
    print(page(found))


if __name__ == "__main__":
    main()
