"""Folders that plain `transformers` loads as `AutoModelForSequenceClassification` with one output: how one is written.

Such a class reads a linear map of the state of a row's last token that is no padding. So its tokenizer must pad with
another token than the one that ends a reply, and its chat template must write nothing behind that.
Shape suffixes: D = hidden size.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.models.adapters import FOLDER, has_adapters, merged, save_adapters
from rlhf_core.text.chat import reply_form

SHIFT = "score_shift"
"""Key of `config.json`: what has to be added to the class's output, where it has no place for a constant."""
LABEL = "score"


class LinearScore(NamedTuple):
    """A score that is weight · (state of the last token) + constant, the standardisation within both."""

    weight_D: Tensor
    constant: float


def why_no_class(body: PreTrainedModel) -> str | None:
    """Why `transformers` has no class that scores with this body as a linear head does; None where it has one."""
    kind = _class_of(body)
    if kind is None:
        return f"transformers has no sequence classifier for model_type {body.config.model_type}"
    with torch.device("meta"):
        model = kind(copy.deepcopy(body.config))
    if type(getattr(model, kind.base_model_prefix, None)) is not type(body):
        return f"{kind.__name__} has another body than {type(body).__name__}"
    children = dict(model.named_children())
    if children.keys() != {kind.base_model_prefix, "score"} or not isinstance(children["score"], nn.Linear):
        return f"{kind.__name__} does more with a state than one linear map"
    return None


def why_no_padding(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why no text of the tokenizer can be padded so that its last token is found; None where it can."""
    if _padding(tokenizer) is None:
        return "its tokenizer has no special token beside the one that ends a reply, so padding would hide the end"
    return None


def save_classifier(
    body: PreTrainedModel, score: LinearScore, tokenizer: PreTrainedTokenizerBase, folder: Path | str
) -> None:
    """Write body, score and tokenizer as a plain sequence classifier; adapters as `save_policy` does.

    The class of a decoder has no bias. The constant then stands in `config.json` as `score_shift`: differences of
    scores are the same with and without it.
    """
    if has_adapters(body):
        save_adapters(body, Path(folder) / FOLDER)
        body = merged(body)
    tokenizer = classifier_tokenizer(tokenizer)
    model = _classifier(body, score, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def classifier_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose rows end with the token that ends a reply, whether padded or not, as a template writes them.

    Raises:
        ValueError: see `why_no_padding`.
    """
    changed, padding = copy.deepcopy(tokenizer), _padding(tokenizer)
    if padding is None:
        raise ValueError(str(why_no_padding(tokenizer)))
    changed.pad_token, changed.padding_side = padding, "right"
    if changed.chat_template is not None:
        changed.chat_template = _ending_with_the_reply(changed)
    return changed


def _class_of(body: PreTrainedModel) -> Any:
    found = AutoModelForSequenceClassification._model_mapping.get(type(body.config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def _classifier(body: PreTrainedModel, score: LinearScore, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    kind, config = _class_of(body), copy.deepcopy(body.config)
    config.id2label, config.label2id = {0: LABEL}, {LABEL: 0}
    config.problem_type = "regression"  # the score is given as it is, and by no sigmoid
    config.pad_token_id = tokenizer.pad_token_id
    config.name_or_path = ""  # where it was loaded from is no property of the model
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    setattr(model, kind.base_model_prefix, body)
    model.score = nn.Linear(len(score.weight_D), 1, bias=model.score.bias is not None, device=body.device)
    with torch.no_grad():
        model.score.weight.copy_(score.weight_D[None])
        if model.score.bias is not None:
            model.score.bias.fill_(score.constant)
        elif score.constant:
            setattr(model.config, SHIFT, score.constant)
    return model.eval()


def _padding(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token that no row ends with: the padding token, or another special one, the unknown before the first."""
    tokens = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens)
    known = tokenizer.get_vocab()
    return next((token for token in tokens if token in known and token != tokenizer.eos_token), None)


def _ending_with_the_reply(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template without what it writes behind the end of the last reply; ended by the end token where it was not."""
    template, form = str(tokenizer.chat_template), reply_form(tokenizer)
    tail, end = form.around[2], tokenizer.eos_token
    behind, ending = (tail, end) if form.end_id is None else (tail.partition(end)[2], "")
    if not behind and not ending:
        return template
    return (
        "{% set rendered %}{{ '' }}" + template.removesuffix("\n") + "{{ '' }}{% endset %}"
        f"{{% set behind = {json.dumps(behind)} %}}"
        "{% if not add_generation_prompt and messages[-1]['role'] == 'assistant' and rendered.endswith(behind) %}"
        f"{{{{ rendered[:rendered | length - behind | length] ~ {json.dumps(ending)} }}}}"
        "{% else %}{{ rendered }}{% endif %}"
    )
