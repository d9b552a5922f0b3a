"""Stage `reward`: Bradley-Terry reward model from the SFT weights, judged on held-out pairs before anyone may use it.

Reads artifacts/preferences, artifacts/sft/model and artifacts/validate/graded.parquet. Writes model/,
heldout_scores.parquet, graded_scores.parquet and calibration.json. A reward model that fails the gate
`reward.min_pairwise_accuracy` is not published.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_core.config import RewardConfig
from rlhf_core.data.pairs import PreferenceGroup, encode_pairs, group_pairs
from rlhf_core.data.records import prompt_id
from rlhf_core.errors import DataError, GateRefused
from rlhf_core.evaluation.judges import reward_scores
from rlhf_core.evaluation.reward_card import calibration_bins, reward_card
from rlhf_core.models.policy import load_policy
from rlhf_core.models.reward import RewardModel
from rlhf_core.models.tokenizer import encode_prompts, encode_responses, load_tokenizer
from rlhf_core.state.atomic import write_json
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.reward import standardise, train_reward
from tasks import paths
from tasks.stage import Stage
from tasks.tables import SCHEMAS, read_table, write_table

SCORING_BATCH = 256
STANDARDISE_GROUPS = 500  # prompts whose responses set the scale: enough for its second digit
LAST_STEPS = 20  # steps over which the training loss is averaged
CONFIDENCE = 0.95
Row = Mapping[str, Any]


def run(stage: Stage) -> dict[str, Any]:
    """Train, standardise, evaluate and gate; returns the figures of `reports/metrics/reward.json`.

    Raises:
        DataError: there is no training pair.
        GateRefused: a held-out figure is undefined or on the wrong side of its gate in the section `reward`.
    """
    tokenizer = load_tokenizer(stage.root / paths.SFT / "model")
    groups = _training_groups(stage, tokenizer)
    model, state = _train(stage, groups, tokenizer.pad_token_id)
    scorer = _Scorer(stage, model, tokenizer)
    heldout = read_table(stage.root / paths.PREFERENCES / "heldout.parquet").to_list()
    graded = read_table(stage.root / paths.VALIDATE / "graded.parquet").to_list()
    chosen = scorer((row["prompt"], row["chosen"]) for row in heldout)
    rejected = scorer((row["prompt"], row["rejected"]) for row in heldout)
    scores = scorer((row["prompt"], row["response"]) for row in graded)
    card = reward_card(
        chosen,
        rejected,
        [len(row["chosen"]) for row in heldout],
        [len(row["rejected"]) for row in heldout],
        ([prompt_id(row["prompt"]) for row in graded], [row["score"] for row in graded], scores) if graded else None,
        CONFIDENCE,
        stage.params.seed,
        prompt_ids=[row["prompt_id"] for row in heldout],
        margin_scale=float(model.scale),
    )
    _gate(card, stage.params.reward)
    write_table(stage.out / "heldout_scores.parquet", _pair_rows(heldout, chosen, rejected), SCHEMAS["heldout_scores"])
    write_table(stage.out / "graded_scores.parquet", _graded_rows(graded, scores), SCHEMAS["graded_scores"])
    write_json(stage.out / "calibration.json", _calibration(card, chosen, rejected, float(model.scale)))
    model.save(stage.out / "model", tokenizer)
    return card | _training_figures(stage, state, groups, model)


def _training_groups(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[PreferenceGroup]:
    path = paths.PREFERENCES / "train.parquet"
    model = stage.params.model
    pairs = encode_pairs(
        tokenizer,
        read_table(stage.root / path),
        max_prompt_tokens=model.max_prompt_tokens,
        max_response_tokens=model.max_response_tokens,
    )
    if not pairs:
        raise DataError(f"{path}: no pair to learn from. Fix: more labelled pairs, or a looser `preferences` section")
    return group_pairs(pairs)


def _train(stage: Stage, groups: Sequence[PreferenceGroup], pad_id: int) -> tuple[RewardModel, TrainState]:
    cfg = stage.params.reward
    policy = load_policy(stage.root / paths.SFT / "model")
    model = RewardModel.from_policy(policy, cfg.head, stage.rng().integer("head")).to(stage.device)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)
    state = stage.restore(TrainState(modules={"reward": model}, optimizers={"reward": optimizer}))
    train_reward(cfg, state, groups, seed=stage.params.seed, pad_id=pad_id, log=stage.log, checkpoint=stage.checkpoint)
    rows = [(group.prompt, response) for group in groups[:STANDARDISE_GROUPS] for response in group.responses]
    prompts, responses = zip(*rows, strict=True)
    standardise(model, reward_scores(model, prompts, responses, pad_id=pad_id, batch_size=SCORING_BATCH))
    return model, state


class _Scorer:
    """Scores (prompt, response) texts with the trained model; a text that comes up again is not scored again."""

    def __init__(self, stage: Stage, model: RewardModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._limits, self._model, self._tokenizer = stage.params.model, model, tokenizer
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, texts: Iterable[tuple[str, str]]) -> list[float]:
        texts = list(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._score(new)
        return [self._known[text] for text in texts]

    def _score(self, new: Sequence[tuple[str, str]]) -> None:
        prompts = encode_prompts(self._tokenizer, [prompt for prompt, _ in new], self._limits.max_prompt_tokens)
        responses = encode_responses(self._tokenizer, [text for _, text in new], self._limits.max_response_tokens)
        scores = reward_scores(
            self._model, prompts, responses, pad_id=self._tokenizer.pad_token_id, batch_size=SCORING_BATCH
        )
        self._known |= dict(zip(new, scores, strict=True))


def _gate(card: Mapping[str, Any], cfg: RewardConfig) -> None:
    """Refuse a model whose figures do not pass; an undefined figure never passes a gate that is set."""
    if card["pairwise_accuracy"] is None:
        raise GateRefused(
            f"reward: pairwise_accuracy is undefined ({card['undefined']['pairwise_accuracy']}). "
            "Fix: hold prompts out (data.heldout_prompts or data.heldout_share) that have labelled pairs"
        )
    gates = (
        ("pairwise_accuracy", "below reward.min_pairwise_accuracy", cfg.min_pairwise_accuracy, 1),
        ("spearman", "below reward.min_spearman", cfg.min_spearman, 1),
        ("kendall", "below reward.min_kendall", cfg.min_kendall, 1),
        ("ece", "above reward.max_ece", cfg.max_ece, -1),
    )
    for figure, relation, bound, sign in gates:
        if bound is None:
            continue
        value = card[figure]
        if value is None or sign * value < sign * bound:
            shown = f"undefined ({card['undefined'][figure]})" if value is None else f"{value:.3f}"
            raise GateRefused(
                f"reward: {figure} {shown} on {card['num_pairs']} held-out pairs and {card['num_graded']} graded "
                f"responses is {relation} {bound}. Fix: more or cleaner preference pairs, a longer or gentler "
                "training, another reward.head; or move the gate if this is good enough"
            )


def _pair_rows(rows: Sequence[Row], chosen: Sequence[float], rejected: Sequence[float]) -> Iterator[dict[str, Any]]:
    for row, chosen_score, rejected_score in zip(rows, chosen, rejected, strict=True):
        yield {
            "pair_id": row["pair_id"],
            "prompt_id": row["prompt_id"],
            "chosen_score": chosen_score,
            "rejected_score": rejected_score,
            "margin": chosen_score - rejected_score,
            "chosen_chars": len(row["chosen"]),
            "rejected_chars": len(row["rejected"]),
        }


def _graded_rows(rows: Sequence[Row], scores: Sequence[float]) -> Iterator[dict[str, Any]]:
    for row, model_score in zip(rows, scores, strict=True):
        yield {key: row[key] for key in ("id", "prompt", "response", "score")} | {"model_score": model_score}


def _calibration(
    card: Mapping[str, Any], chosen: Sequence[float], rejected: Sequence[float], margin_scale: float
) -> dict[str, Any]:
    margins = [one - other for one, other in zip(chosen, rejected, strict=True)]
    return {
        "bins": calibration_bins(margins, margin_scale=margin_scale, confidence=CONFIDENCE),
        "ece": card["ece"],
        "margin_scale": margin_scale,
        "num_pairs": card["num_pairs"],
    }


def _training_figures(
    stage: Stage, state: TrainState, groups: Sequence[PreferenceGroup], model: RewardModel
) -> dict[str, Any]:
    last = state.history[-LAST_STEPS:]
    return {
        "head": stage.params.reward.head,
        "loss_train": sum(row["loss/train"] for row in last) / len(last),
        "num_train_pairs": sum(len(group.pairs) for group in groups),
        "num_train_prompts": len(groups),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": state.step,
    }
