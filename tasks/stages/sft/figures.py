"""What the SFT stage publishes of a trained model beside its weights: a few responses, and its headline figures."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.data.batching.examples import Example
from rlhf_core.evaluation.intervals import bounds, perplexity, too_few, why_no_bounds
from rlhf_core.evaluation.jackknife import ratio_interval
from rlhf_core.evaluation.policy_measurement import PolicyEvaluator
from rlhf_core.models.adapters import parameter_counts
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.tokenizer import encode_prompts
from rlhf_core.trainers.optimisation import refused_steps
from rlhf_core.trainers.sft import example_losses
from tasks.frame.stage import Stage

CONFIDENCE = 0.95
NUM_SAMPLES = 8
Row = Mapping[str, Any]


def samples(
    stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Sequence[Row]
) -> list[dict[str, str]]:
    """What the model writes, greedily, to prompts it was not trained on, beside the demonstrated response."""
    rows = {row["prompt"]: row for row in kept}
    shown = list(rows.values())[:NUM_SAMPLES]
    cfg = stage.params.model
    evaluator = PolicyEvaluator(
        tokenizer=tokenizer,
        prompts=encode_prompts(tokenizer, [row["prompt"] for row in shown], cfg.max_prompt_tokens),
        max_new_tokens=cfg.max_response_tokens,
    )
    written = evaluator.sample("sft", model, stage.rng()("samples"), temperature=0.0)
    return [
        {"prompt": row["prompt"], "reference": row["response"], "response": text}
        for row, text in zip(shown, written.texts, strict=True)
    ]


def figures(
    stage: Stage,
    state: TrainState,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[Sequence[Example]],
    groups: Sequence[str],
) -> dict[str, Any]:
    """Headline figures; null is what was not measured, `undefined` says why.

    `train_loss` is the mean of the last `eval_every` steps.

    Args:
        model: whole, with the weights that are published.
        heldout: the examples of each held-out demonstration.
        groups: the prompt group of each held-out demonstration.
    """
    losses = [row["loss/train"] for row in state.history[-stage.params.sft.eval_every :] if "loss/train" in row]
    loss = state.extra.get("best_heldout_loss")
    loss_bounds, undefined = _heldout_bounds(
        model, heldout, groups, stage.params.sft.batch_size, int(tokenizer.pad_token_id)
    )
    found = {
        "train_loss": sum(losses) / len(losses) if losses else None,
        "heldout_loss": loss,
        **loss_bounds,
        "heldout_perplexity": None if loss is None else perplexity(loss),
        "best_step": state.extra.get("best_step", state.step),
        "num_heldout": len(heldout),
        "vocab_size": len(tokenizer),
        "pad_is_eos": tokenizer.pad_token_id == tokenizer.eos_token_id,
        **parameter_counts(model),
        "steps": state.step,
        "refused_steps": refused_steps(state),
        "stopped_early": bool(state.extra.get("stopped_early", False)),
    }
    unread = "none of the replies kept for it is written whole" if heldout else "no demonstration is kept for it"
    kept = "no finite loss was measured" if any(heldout) else unread
    why = {
        "train_loss": "no step was taken",
        "heldout_loss": kept,
        "heldout_perplexity": kept if loss is None else "beyond the largest float",
    }
    return found | {"undefined": undefined | {name: why[name] for name in why if found[name] is None}}


def _heldout_bounds(
    model: PreTrainedModel, heldout: Sequence[Sequence[Example]], groups: Sequence[str], batch_size: int, pad_id: int
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Bounds of `heldout_loss`, prompt groups taken for what was sampled; and why they are undefined.

    The loss itself is the lowest of several looks at the same demonstrations; how many looks there were is not in them.
    """
    examples = list(chain(*heldout))
    owners = [group for own, group in zip(heldout, groups, strict=True) for _ in own]
    losses = example_losses(model, examples, batch_size, pad_id)
    interval = ratio_interval(losses, [example.num_targets for example in examples], owners, CONFIDENCE)
    found = bounds("heldout_loss", interval)
    return found, why_no_bounds(found, "heldout_loss", too_few(len(set(owners)), "prompt groups"))
