"""Reward models from elsewhere, against transformers' own tokenizer, class and pipeline."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.foreign import DECODERS, ENCODERS, chatting, classifier, foreign_folder
from support.tokenizer import LLAMA3
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from rlhf_core.errors import RlhfError
from rlhf_core.models.scoring.foreign import ForeignRewardModel, check_classifier_folder
from rlhf_core.text.encoded import TextCounts

DIALOGUE = "\n\nHuman: Aisle?\n\nAssistant: An answer.\n\nHuman: The price of brooms?\n\nAssistant:"
PROMPTS = ["The price of brooms?", "Aisle?", DIALOGUE, "A question about the price."]
RESPONSES = ["12.", "An answer, and another one.", "Be kind. And another one, and another.", "x"]


def own(folder: Path) -> tuple[PreTrainedTokenizerFast, torch.nn.Module]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_read_dialogues_by_their_own_template(tmp_path: Path, family: str) -> None:
    folder = foreign_folder(tmp_path, family)
    check_classifier_folder(folder)
    tokenizer, model = own(folder)
    dialogues = [[{"role": "user", "content": text}] for text in PROMPTS]
    dialogues[2] = [
        {"role": "user", "content": "Aisle?"},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "The price of brooms?"},
    ]
    texts = [
        tokenizer.apply_chat_template([*before, {"role": "assistant", "content": reply}], tokenize=False)
        for before, reply in zip(dialogues, RESPONSES, strict=True)
    ]
    scorer = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    expected = [row["score"] for row in scorer(texts, function_to_apply="none", add_special_tokens=False)]
    scores = ForeignRewardModel.load(folder).score_texts(PROMPTS, RESPONSES, batch_size=3)
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_read_prompt_and_response_as_a_pair(tmp_path: Path, family: str) -> None:
    folder = foreign_folder(tmp_path, family)
    check_classifier_folder(folder)
    tokenizer, model = own(folder)
    pairs = [{"text": p.strip(), "text_pair": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    scorer = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    expected = [scorer(pair, function_to_apply="none")["score"] for pair in pairs]
    scores = ForeignRewardModel.load(folder).score_texts(PROMPTS, RESPONSES, batch_size=3)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_a_template_without_padding_is_read_row_by_row(tmp_path: Path) -> None:
    model = classifier("llama")
    model.save_pretrained(tmp_path)
    chatting().save_pretrained(tmp_path)
    foreign = ForeignRewardModel.load(tmp_path)
    assert foreign.model.config.pad_token_id is None
    alone = [
        foreign.score_texts([prompt], [reply], batch_size=8)[0]
        for prompt, reply in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert foreign.score_texts(PROMPTS, RESPONSES, batch_size=8) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_long_rows_lose_their_beginning_and_are_counted(tmp_path: Path, family: str) -> None:
    model = ForeignRewardModel.load(foreign_folder(tmp_path, family))
    counts = TextCounts()
    long = "\n\nHuman: " + "brooms and brooms " * 400 + "\n\nAssistant: Yes.\n\nHuman: Aisle?\n\nAssistant:"
    scores = model.score_texts([long, "Aisle?"], ["An answer.", "An answer."], batch_size=2, counts=counts)
    assert (counts.scored_encoded, counts.scored_cut) == (2, 1)
    if family == "llama":  # the oldest turns go, and the rest is a dialogue of its own
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_what_somebody_typed_is_no_separator(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path, "bert")
    model, separator = ForeignRewardModel.load(folder), own(folder)[0].sep_token_id
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: seen.extend(given["input_ids"].flatten().tolist()), with_kwargs=True
    )
    model.score_texts(["[SEP] what"], ["[SEP] that"], batch_size=1)
    assert seen.count(separator) == 2


def test_the_date_of_a_template_stands_still(tmp_path: Path) -> None:
    model = classifier("llama")
    model.save_pretrained(tmp_path)
    chatting(LLAMA3).save_pretrained(tmp_path)
    assert "26 Jul 2024" in ForeignRewardModel.load(tmp_path).tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
    )


def _without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))


def _not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _three_labels(folder: Path) -> None:
    foreign_folder(folder, num_labels=3)


def _language_model(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=600, **sizes)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_head, "1 missing: score.weight"),
        (_pickled, r"pytorch_model.bin is not read: a pickle can run code"),
        (_code, "auto_map: the folder wants to run code of its own"),
        (_not_finite, r"1 tensors with NaN or infinity: score\.weight"),
        (_three_labels, r"3 outputs \(LABEL_0, LABEL_1, LABEL_2\)"),
        (_language_model, r"LlamaForCausalLM: no sequence classifier, so it has no score"),
    ],
)
def test_what_is_no_reward_model_is_refused_in_one_line(tmp_path: Path, spoil, says: str) -> None:  # type: ignore[no-untyped-def]
    folder = foreign_folder(tmp_path)
    spoil(folder)
    for read in (check_classifier_folder, ForeignRewardModel.load):
        with pytest.raises(RlhfError, match=says) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        assert "Fix: " in str(caught.value)
