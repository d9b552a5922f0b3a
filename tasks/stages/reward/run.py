"""Stage `reward`: reward model from the SFT weights, judged on held-out pairs before anyone may use it.

Reads artifacts/preferences, artifacts/sft/model and artifacts/validate/graded.parquet. Writes model/,
heldout_scores.parquet, graded_scores.parquet and calibration.json. A reward model that fails a gate of
the section `reward` (`min_pairwise_accuracy`, `min_spearman`, `max_ece` and the like) is not published.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import RewardConfig
from rlhf_core.config.watched import PLACEHOLDER
from rlhf_core.data.batching.pairs import PreferenceGroup, encode_pairs, group_pairs
from rlhf_core.data.reading.kinds import OVERALL
from rlhf_core.engine.batches import WIDE_ROWS_AT_ONCE
from rlhf_core.errors import ConfigError, DataError, GateRefused
from rlhf_core.evaluation.response_scores import ResponseScore, read_responses
from rlhf_core.evaluation.reward_card import ScoredPairs, reward_card
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.policy import load_policy
from rlhf_core.models.quantise import quantise
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.start import load_start
from rlhf_core.state.atomic import write_json
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.identity import prompt_group, prompt_id
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, encode_whole_responses, load_tokenizer
from rlhf_core.trainers.optimisation import make_optimizer, refused_steps
from rlhf_core.trainers.reward.plan import PUBLISHED, make_models
from rlhf_core.trainers.reward.teacher import ensemble_of
from rlhf_core.trainers.reward.trainer import TrainedReward, standardise_on, train_reward
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.keeper import run_context
from tasks.stages.reward.figures import (
    CONFIDENCE,
    calibration,
    criterion_figures,
    graded_rows,
    member_figures,
    pair_rows,
    ranking_figures,
    uncertainty,
)
from tasks.stages.texts import count_texts, no_pairs, text_figures, warn_of_texts
from tasks.tables import SCHEMAS, read_table, write_table

STANDARDISE_GROUPS = 500  # prompts whose responses set the scale: enough for its second digit
LAST_STEPS = 20  # steps over which the training loss is averaged
Row = Mapping[str, Any]


def run(stage: Stage) -> dict[str, Any]:
    """Train, standardise, evaluate and gate; returns the figures of `reports/metrics/reward.json`.

    Raises:
        DataError: there is no training pair, or none on a criterion.
        GateRefused: the interval of a held-out figure is undefined or reaches the wrong side of its gate in the section
            `reward`.
    """
    cfg = stage.params.reward
    tokenizer = load_tokenizer(stage.root / paths.SFT / "model")
    groups = _training_groups(stage, tokenizer)
    heldout = _whole(
        stage, tokenizer, _table(stage, paths.PREFERENCES / "heldout.parquet"), "chosen", "rejected", name="held out"
    )
    graded, num_trained = grades_to_judge_by(stage)
    graded = _whole(stage, tokenizer, graded, "response", name="graded")
    others = [row for row in _other_pairs(stage, "heldout") if not row["tie"]]
    others = _whole(stage, tokenizer, others, "chosen", "rejected", name="others")
    warn_of_texts(stage)
    trained = _train(stage, groups, tokenizer)
    ensemble, left_out = _ensemble(cfg, trained)
    model = _published(trained.state, ensemble, groups, tokenizer.pad_token_id)
    reader = _Reader(stage, model, tokenizer)
    chosen, rejected = reader.pairs(heldout)
    readings = reader((row["prompt"], row["response"]) for row in graded)
    grades = [row["score"] for row in graded]
    pairs = ScoredPairs(
        [one.score for one in chosen],
        [one.score for one in rejected],
        [len(row["chosen"]) for row in heldout],
        [len(row["rejected"]) for row in heldout],
        [row["prompt_id"] for row in heldout],
    )
    card = reward_card(
        pairs,
        ([prompt_id(row["prompt"]) for row in graded], grades, [one.score for one in readings]) if graded else None,
        CONFIDENCE,
        margin_scale=float(model.scale),
    )
    check_gates(card, cfg)
    unit = float(model.unit)
    write_table(
        stage.out / "heldout_scores.parquet", pair_rows(heldout, chosen, rejected, unit), SCHEMAS["heldout_scores"]
    )
    write_table(stage.out / "graded_scores.parquet", graded_rows(graded, readings), SCHEMAS["graded_scores"])
    write_json(stage.out / "calibration.json", calibration(card, heldout, chosen, rejected, float(model.scale)))
    model.save(stage.out / "model", tokenizer)
    card["num_graded_left_out"] = num_trained
    card |= uncertainty(chosen, rejected, unit, grades, readings)
    card |= criterion_figures(cfg, [*heldout, *others], *reader.pairs([*heldout, *others]))
    if ensemble is not None:
        members = _Reader(stage, ensemble, tokenizer).pairs(heldout)
        card |= member_figures(heldout, *members, left_out, ensemble.weights_M.tolist())
    card |= ranking_figures(cfg, groups) | _training_figures(stage, trained.state, groups, model)
    return card | text_figures(stage)


def grades_to_judge_by(stage: Stage) -> tuple[list[Row], int]:
    """Graded responses to judge the model by, and how many are left out as their prompts are trained on."""
    trained = read_table(stage.root / paths.PREFERENCES / "train.parquet")["prompt"]
    groups = {prompt_group(prompt) for prompt in set(trained)}
    rows = read_table(stage.root / paths.VALIDATE / "graded.parquet").to_list()
    kept = [row for row in rows if prompt_group(row["prompt"]) not in groups]
    return kept, len(rows) - len(kept)


def _training_groups(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[PreferenceGroup]:
    """Pairs of the wanted criteria by prompt; each criterion has some."""
    path = paths.PREFERENCES / "train.parquet"
    model, criteria = stage.params.model, stage.params.reward.criteria
    rows = _table(stage, path) if OVERALL in criteria else []
    rows += [row for row in _other_pairs(stage, "train") if row["criterion"] in criteria]
    pairs = encode_pairs(
        tokenizer,
        rows,
        max_prompt_tokens=model.max_prompt_tokens,
        max_response_tokens=model.max_response_tokens,
        counts=count_texts(stage, "training pairs"),
    )
    if not pairs:
        raise no_pairs(stage, path, "training pairs")
    for name in criteria.keys() - {pair.label.criterion for pair in pairs}:
        raise DataError(
            f"reward.criteria: no training pair on {name!r}. Fix: grade responses to training prompts on it, or "
            "compare them (`criterion` in graded, votes, comparisons or rankings; validate.criteria), or leave it out"
        )
    return group_pairs(pairs)


def _other_pairs(stage: Stage, split: str) -> list[Row]:
    return [row for row in _table(stage, paths.PREFERENCES / "other_pairs.parquet") if row["split"] == split]


def _table(stage: Stage, path: Path) -> list[Row]:
    return list(read_table(stage.root / path).to_list())


def _whole(stage: Stage, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *fields: str, name: str) -> list[Row]:
    """The rows whose responses the chat template writes whole; what they lose when they are read is counted."""
    limits, counts = stage.params.model, count_texts(stage, name)
    encode_prompts(tokenizer, [row["prompt"] for row in rows], limits.max_prompt_tokens, counts)
    responses = [
        encode_whole_responses(tokenizer, [row[field] for row in rows], limits.max_response_tokens, counts)
        for field in fields
    ]
    by_row = list(zip(*responses, strict=True))
    if len(fields) > 1:
        counts.pairs_encoded += len(rows)
        counts.pairs_equal_when_cut += sum(None not in ids and ids[0] == ids[1] for ids in by_row)
    return [row for row, ids in zip(rows, by_row, strict=True) if None not in ids]


def _start(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | RewardModel:
    """What training starts from: the SFT model, or the reward model of `reward.init`."""
    cfg = stage.params.reward
    if cfg.init == PLACEHOLDER:
        return load_policy(stage.root / paths.SFT / "model")
    try:
        return load_start(stage.root / cfg.init, cfg.head, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{paths.PARAMS}: reward.init: {error}") from error


def _train(stage: Stage, groups: Sequence[PreferenceGroup], tokenizer: PreTrainedTokenizerBase) -> TrainedReward:
    """Every model of the run, trained."""
    cfg, rng = stage.params.reward, stage.rng()
    state = TrainState()
    start = _start(stage, tokenizer)
    quantise(start.body if isinstance(start, RewardModel) else start, stage.params.model, "reward")
    for name, made in make_models(cfg, start, rng).items():
        made.to(stage.device)
        add_adapters(made.body, stage.params.model.lora_at("reward"), rng.integer(f"adapters/{name}"))
        state.modules[name] = stage.shard(made)
        state.optimizers[name] = make_optimizer(state.modules[name], cfg.learning_rate, cfg.weight_decay)
    trained = train_reward(cfg, stage.restore(state), groups, run_context(stage, stage, tokenizer.pad_token_id))
    stage.finish(state)
    return trained


def _ensemble(cfg: RewardConfig, trained: TrainedReward) -> tuple[RewardEnsemble | None, list[float | None]]:
    """The members as one model, where there are several, and their accuracy on prompts that they did not draw."""
    if trained.aggregation is None:
        return None, []
    return ensemble_of(cfg, trained.state.modules, trained.aggregation), trained.aggregation.left_out


def _published(
    state: TrainState, ensemble: RewardEnsemble | None, groups: Sequence[PreferenceGroup], pad_id: int
) -> RewardModel | RewardEnsemble:
    """The only model, the student of the ensemble or the ensemble itself, standardised."""
    single = state.modules.get(PUBLISHED)
    model = cast(RewardModel | RewardEnsemble, single or ensemble)
    standardise_on(model, groups[:STANDARDISE_GROUPS], pad_id, WIDE_ROWS_AT_ONCE)
    return model


class _Reader:
    """Reads (prompt, response) texts with a trained model; a text that comes up again is not read again."""

    def __init__(self, stage: Stage, model: RewardModel | RewardEnsemble, tokenizer: PreTrainedTokenizerBase) -> None:
        self._limits, self._model, self._tokenizer = stage.params.model, model, tokenizer
        self._known: dict[tuple[str, str], ResponseScore] = {}

    def __call__(self, texts: Iterable[tuple[str, str]]) -> list[ResponseScore]:
        texts = list(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._read(new)
        return [self._known[text] for text in texts]

    def pairs(self, rows: Sequence[Row]) -> tuple[list[ResponseScore], list[ResponseScore]]:
        """The chosen and the rejected response of every row."""
        return self((row["prompt"], row["chosen"]) for row in rows), self(
            (row["prompt"], row["rejected"]) for row in rows
        )

    def _read(self, new: Sequence[tuple[str, str]]) -> None:
        prompts = encode_prompts(self._tokenizer, [prompt for prompt, _ in new], self._limits.max_prompt_tokens)
        responses = encode_responses(self._tokenizer, [text for _, text in new], self._limits.max_response_tokens)
        readings = read_responses(
            self._model, prompts, responses, pad_id=self._tokenizer.pad_token_id, batch_size=WIDE_ROWS_AT_ONCE
        )
        self._known |= dict(zip(new, readings, strict=True))


def check_gates(card: Mapping[str, Any], cfg: RewardConfig) -> None:
    """Refuse a model whose figures do not pass with their whole intervals; one that is undefined never passes."""
    if card["pairwise_accuracy"] is None:
        raise GateRefused(
            f"reward: pairwise_accuracy is undefined ({card['undefined']['pairwise_accuracy']}). "
            "Fix: hold prompts out (data.heldout_prompts or data.heldout_share) that have labelled pairs"
        )
    gates = (
        ("pairwise_accuracy", "low", "below reward.min_pairwise_accuracy", cfg.min_pairwise_accuracy, 1),
        ("spearman", "low", "below reward.min_spearman", cfg.min_spearman, 1),
        ("kendall", "low", "below reward.min_kendall", cfg.min_kendall, 1),
        ("ece", "high", "above reward.max_ece", cfg.max_ece, -1),
    )
    for figure, end, relation, limit, sign in gates:
        if limit is None or (figure == "pairwise_accuracy" and limit == 0.0):  # nothing falls below 0
            continue
        value = card[f"{figure}_{end}"]
        if value is None or sign * value < sign * limit:
            shown = f"undefined ({card['undefined'][f'{figure}_{end}']})" if value is None else f"{value:.3f}"
            measured = "undefined" if card[figure] is None else f"{card[figure]:.3f}"
            raise GateRefused(
                f"reward: {figure}_{end} {shown} ({figure} {measured} on {card['num_heldout_pairs']} held-out pairs "
                f"and {card['num_graded']} graded responses) is {relation} {limit}. Fix: more or cleaner preference "
                "pairs, more held-out prompts, a longer or gentler training, another reward.head; or move the gate if "
                "this is good enough"
            )


def _training_figures(
    stage: Stage, state: TrainState, groups: Sequence[PreferenceGroup], model: RewardModel | RewardEnsemble
) -> dict[str, Any]:
    losses = [row["loss/train"] for row in state.history[-LAST_STEPS:] if "loss/train" in row]
    return {
        "head": stage.params.reward.head,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "num_train_pairs": sum(len(group.pairs) for group in groups),
        "num_train_prompts": len(groups),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": state.step,
        "refused_steps": refused_steps(state),
    }
