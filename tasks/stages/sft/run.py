"""Stage `sft`: train the tokenizer and the language model on demonstrations, responses only.

Reads artifacts/validate/demonstrations.parquet and heldout_replies.parquet and, where `model.source` is `folder`, the
pretrained folder. Writes model/ (a folder that transformers loads) and samples.json.
A share of the training demonstrations, by prompt group, is kept for the held-out loss that ends training early;
demonstrations of held-out prompts are never read for that.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.data.batching.examples import Example, Turns, encode_dialogues
from rlhf_core.data.cleaning.splits import is_heldout, next_heldout
from rlhf_core.errors import DataError
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.checks import check_fit
from rlhf_core.models.policy import build_policy, eos_token_ids, load_policy, save_policy
from rlhf_core.models.quantise import quantise
from rlhf_core.state.atomic import write_json
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.identity import prompt_group
from rlhf_core.text.tokenizer import load_tokenizer, train_tokenizer
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.sft import train_sft
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.keeper import run_context
from tasks.stages.notice import warn
from tasks.stages.sft.figures import figures, samples
from tasks.stages.sft.learned_turns import LearnedTurns
from tasks.stages.texts import count_texts, nothing_to_learn, text_figures, warn_of_texts
from tasks.tables import read_table

Row = Mapping[str, Any]
DEMONSTRATIONS = paths.VALIDATE / "demonstrations.parquet"


def run(stage: Stage) -> dict[str, Any]:
    """Train, save and show a few responses; returns the figures of `reports/metrics/sft.json`.

    Raises:
        DataError: there is no demonstration to learn from, or no token of any of them counts in the loss.
        ConfigError, EnvironmentProblem: the pretrained folder cannot be used.
    """
    train, kept = split_demonstrations(stage)
    model, tokenizer = _starting_point(stage, train)
    model.to(stage.device)
    add_adapters(model, stage.params.model.lora_at("sft"), stage.rng().integer("adapters"))
    cfg = stage.params.sft
    policy = stage.shard(model)
    optimizer = make_optimizer(policy, cfg.learning_rate, cfg.weight_decay)
    turns = LearnedTurns(kept, every=cfg.turns == "all")
    learned = turns.of(train)
    if not any(learned):
        raise DataError(
            f"{DEMONSTRATIONS}: no token to learn in {len(train)} demonstrations: all {turns.left_out} turns are "
            "held-out replies. Fix: give other demonstrations"
        )
    examples = list(chain(*_encode(stage, tokenizer, train, learned, "training")))
    heldout = _encode(stage, tokenizer, kept, turns.all_of(kept), "held out")
    turns.say(stage)
    warn_of_texts(stage)
    if not sum(example.num_targets for example in examples):
        what = f"no token to learn in {len(train)} demonstrations"
        raise nothing_to_learn(stage, DEMONSTRATIONS, what, "training", "give other demonstrations")
    state = stage.restore(TrainState(modules={"policy": policy}, optimizers={"policy": optimizer}))
    train_sft(cfg, state, examples, list(chain(*heldout)), run_context(stage, stage, tokenizer.pad_token_id))
    stage.finish(state)
    save_policy(model, tokenizer, stage.out / "model")
    write_json(stage.out / "samples.json", samples(stage, model, tokenizer, kept))
    groups = [prompt_group(row["prompt"]) for row in kept]
    found = figures(stage, state, model, tokenizer, heldout, groups)
    return found | {"num_demonstrations": len(train)} | turns.figures() | text_figures(stage)


def split_demonstrations(stage: Stage) -> tuple[list[Row], list[Row]]:
    """Training rows, and those kept for the held-out loss; all rows of one prompt group are on one side."""
    share = stage.params.sft.heldout_share
    # A name of its own keeps this choice independent of the split by `data.heldout_share`.
    rows = [
        (f"sft {prompt_group(row['prompt'])}", row)
        for row in read_table(stage.root / DEMONSTRATIONS)
        if row["split"] == "train"
    ]
    groups = {group for group, _ in rows}
    heldout = {group for group in groups if is_heldout(group, share)}
    if share and not heldout and len(groups) > 1:
        heldout = {next_heldout(groups)}
        warn(stage, f"sft.heldout_share {share:g} of {len(groups)} prompt groups is none; one is kept all the same")
    train = [row for group, row in rows if group not in heldout]
    kept = [row for group, row in rows if group in heldout]
    if not train:
        raise DataError(f"{DEMONSTRATIONS}: no training row. Fix: give data.demonstrations or data.comparisons")
    return train, kept


def _starting_point(stage: Stage, train: Sequence[Row]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    cfg = stage.params.model
    if cfg.source == "folder":
        folder = stage.root / cfg.path
        tokenizer, model = load_tokenizer(folder, cfg.chat), load_policy(folder)
        quantise(model, cfg, "sft")
        check_fit(model, tokenizer, cfg.max_prompt_tokens + cfg.max_response_tokens, str(folder))
        model.generation_config.eos_token_id = list(eos_token_ids(model, tokenizer))
        return model, tokenizer
    corpus = (text for row in train for text in (row["prompt"], f" {row['response'].strip()}"))
    tokenizer = train_tokenizer(corpus, cfg.vocab_size)
    seed = stage.rng().integer("weights")
    return build_policy(cfg, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed), tokenizer


def _encode(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], turns: Sequence[Turns], name: str
) -> list[list[Example]]:
    """The turns of each demonstration as tokens; what they lose is counted under a name."""
    limits = stage.params.model
    return encode_dialogues(
        tokenizer,
        turns,
        [row["task"] for row in rows],
        max_prompt_tokens=limits.max_prompt_tokens,
        max_response_tokens=limits.max_response_tokens,
        counts=count_texts(stage, name),
    )
