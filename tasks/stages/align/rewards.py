"""What PPO is rewarded by beside the reward model, and the held-out scorer that its guard reads."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_core.config import PPOConfig
from rlhf_core.engine.batches import ROWS_AT_ONCE
from rlhf_core.errors import ConfigError
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.scoring.ensemble import load_reward_model, tokenizer_folder
from rlhf_core.models.scoring.foreign import ForeignRewardModel, is_foreign, read_rows
from rlhf_core.models.scoring.read_as_text import ReadAsText
from rlhf_core.text.tokenizer import decode_response, load_tokenizer
from rlhf_core.trainers.ppo.guard import Watch
from rlhf_core.trainers.ppo.replay import Written
from rlhf_core.trainers.ppo.terms import Rate, RewardTerm, diversity_term, length_term
from tasks.frame.stage import Stage
from tasks.stages.align.prompts import Prompt, heldout_prompts, training_prompts
from tasks.stages.callables import check_is_input, load_rate
from tasks.stages.texts import count_texts


def foreign_reward(stage: Stage, cfg: PPOConfig, key: str, tokenizer: PreTrainedTokenizerBase) -> ReadAsText:
    """The reward model of `reward_model`, which reads the texts of what the policy is asked and writes.

    Raises:
        ConfigError: the folder is no input of the stage, or cannot be used.
    """
    place, folder = f"{key}.reward_model", Path(str(cfg.reward_model))
    check_is_input(stage, folder, f"params.yaml: {place}")
    model = ForeignRewardModel.load(stage.root / folder).to(stage.device)
    prompts = training_prompts(stage, tokenizer)
    prompts += heldout_prompts(stage, tokenizer) if cfg.guard.every else []
    _count_prompts(stage, place, model, [text for text, _ in prompts])
    return ReadAsText(model, tokenizer, prompts)


def further_terms(
    stage: Stage, cfg: PPOConfig, key: str, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[RewardTerm]:
    """The rewards of `scores.terms`, in the order given.

    Raises:
        ConfigError: a function cannot be used.
        DataError: it failed when tried.
    """
    terms = []
    for name, weight in cfg.scores.terms.items():
        match name:
            case "length":
                terms.append(length_term(weight, stage.params.model.max_response_tokens))
            case "diversity":
                terms.append(diversity_term(weight))
            case _:
                rate = load_rate(stage, f"{key}.scores.terms", name, prompts, tokenizer)
                terms.append(RewardTerm(name=name, weight=weight, rate=rate))
    return terms


def held_out_watch(stage: Stage, cfg: PPOConfig, key: str, tokenizer: PreTrainedTokenizerBase) -> Watch | None:
    """Held-out prompts and scorer of the guard; None where there is no guard.

    The prompts are the first of the held-out file; the stage `evaluate` takes the last.

    Raises:
        ConfigError: the scorer cannot be used.
        DataError: there is no held-out prompt, or the scorer failed when tried.
    """
    if not cfg.guard.every or cfg.guard.scorer is None:
        return None
    scorer, place = cfg.guard.scorer, f"{key}.guard.scorer"
    prompts = heldout_prompts(stage, tokenizer)[: cfg.guard.prompts]
    if ":" in scorer:
        rate = load_rate(stage, place, scorer, prompts, tokenizer)
    else:
        rate = _reward_model_rate(stage, place, Path(scorer), prompts, tokenizer)
    return Watch(prompts=[ids for _, ids in prompts], rate=rate)


def _text_rate(
    stage: Stage, place: str, folder: Path, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> Rate:
    """A reward model from elsewhere, which reads texts."""
    model = ForeignRewardModel.load(stage.root / folder).to(stage.device)
    texts = [text for text, _ in prompts]
    _count_prompts(stage, place, model, texts)

    def rate(rows: Sequence[Written]) -> list[float]:
        responses = [decode_response(tokenizer, row.response_ids) for row in rows]
        return model.score_texts([texts[row.prompt] for row in rows], responses, ROWS_AT_ONCE)

    return rate


def _count_prompts(stage: Stage, place: str, model: ForeignRewardModel, texts: Sequence[str]) -> None:
    """Count the prompts that do not fit into the model's limit, whatever is answered."""
    read_rows(model.tokenizer, texts, [""] * len(texts), model.room, count_texts(stage, f"prompts for {place}"))


def _reward_model_rate(
    stage: Stage, place: str, folder: Path, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> Rate:
    check_is_input(stage, folder, f"params.yaml: {place}")
    if is_foreign(stage.root / folder):
        return _text_rate(stage, place, folder, prompts, tokenizer)
    model = load_reward_model(stage.root / folder).to(stage.device).eval()
    if load_tokenizer(tokenizer_folder(stage.root / folder)).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"params.yaml: {place}: {folder} has another tokenizer than the policy. "
            "Fix: a reward model trained from the same SFT model, or package.module:function"
        )

    def rate(rows: Sequence[Written]) -> list[float]:
        ids = [prompts[row.prompt][1] for row in rows], [row.response_ids for row in rows]
        return reward_scores(model, *ids, pad_id=tokenizer.pad_token_id)

    return rate
