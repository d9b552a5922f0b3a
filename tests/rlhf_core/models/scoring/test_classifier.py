"""Reward models as plain sequence classifiers: read by transformers alone, and compared with our own scores."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tokenizer import CHATML, LLAMA2, LLAMA3, byte_level
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    pipeline,
)

from rlhf_core.config.lora import LoraConfig
from rlhf_core.errors import ConfigError
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.checks import check_reward_folder
from rlhf_core.models.scoring.classifier import (
    SAMPLE_ROWS,
    export_classifier,
    our_scores,
    why_not_classifier,
)
from rlhf_core.models.scoring.ensemble import RewardEnsemble, load_reward_model
from rlhf_core.models.scoring.heads import HeadSpec
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import load_tokenizer, train_tokenizer

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "plain": None}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def language_model(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    wide = {"vocab_size": 600, "initializer_range": 0.3, "max_position_embeddings": 256}
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**SIZES, **wide, tie_word_embeddings=True)).eval()
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, **wide, num_key_value_heads=1)).eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)).eval()


def loaded(tmp_path: Path, template: str = "chatml") -> PreTrainedTokenizerBase:
    """A tokenizer as a run has it: saved with a language model and read from its folder."""
    tokenizer = byte_level(TEMPLATES[template], bos=template.startswith("llama"))
    language_model().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return load_tokenizer(tmp_path / "policy")


def reward_model(spec: HeadSpec | None = None, family: str = "llama") -> RewardModel:
    model = RewardModel.from_policy(language_model(family), spec or HeadSpec(kind="last"), seed=0)
    with torch.no_grad():
        model.head.scalar.bias.fill_(0.4)
    model.standardise(0.7, 0.25)
    return model


def by_pipeline(folder: Path, texts: list[str]) -> list[float]:
    scorer = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device="cpu")
    return [row["score"] for row in scorer(texts, function_to_apply="none", add_special_tokens=False)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_folder_of_head_last_is_read_by_plain_transformers(tmp_path: Path, family: str) -> None:
    tokenizer, model = loaded(tmp_path), reward_model(family=family)
    folder = tmp_path / "reward"
    model.save(folder, tokenizer)
    plain, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.config.num_labels == 1
    assert plain.config.id2label == {0: "score"}
    chat = AutoTokenizer.from_pretrained(folder)
    assert plain.config.pad_token_id == chat.pad_token_id != chat.eos_token_id
    rows = [("Aisle?", "An answer."), ("The price of brooms?", "An answer and another one, be kind."), ("A", "B")]
    ours = our_scores(model, tokenizer, rows)
    texts = chat.apply_chat_template(
        [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in rows], tokenize=False
    )
    shift = plain.config.score_shift
    assert shift == pytest.approx((0.4 - 0.7) / 0.25)
    batch = chat(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = plain.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, 0] + shift
    assert padded.tolist() == pytest.approx(ours, abs=1e-5)
    assert [score + shift for score in by_pipeline(folder, texts)] == pytest.approx(ours, abs=1e-5)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[4] / "docs/trainers/reward.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    tokenizer, model = loaded(tmp_path), reward_model()
    model.save(tmp_path / "artifacts/reward/model", tokenizer)
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    exec(code, said)
    ours = our_scores(model, tokenizer, [("Where is the shop?", "In the north.")])
    assert said["score"].item() == pytest.approx(ours[0], abs=1e-5)


def test_our_own_code_reads_the_same_folder(tmp_path: Path) -> None:
    tokenizer, model = loaded(tmp_path), reward_model()
    model.save(tmp_path / "reward", tokenizer)
    check_reward_folder(tmp_path / "reward", tokens=64)
    again = load_reward_model(tmp_path / "reward")
    ours = our_scores(model, tokenizer, SAMPLE_ROWS)
    assert our_scores(again, load_tokenizer(tmp_path / "reward"), SAMPLE_ROWS) == ours
    again.save(tmp_path / "again", load_tokenizer(tmp_path / "reward"))
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "reward")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_exported_scores_are_ours(tmp_path: Path, template: str, family: str) -> None:
    tokenizer = loaded(tmp_path, template)
    parity = export_classifier(reward_model(family=family), tokenizer, tmp_path / "export")
    assert parity.rows == len(SAMPLE_ROWS)
    assert parity.largest_difference <= 1e-5


def test_a_tokenizer_of_the_run_is_exported_with_a_template(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["what is the price of it, and where is the shop?"] * 3, 300)
    parity = export_classifier(reward_model(), tokenizer, tmp_path / "export")
    assert parity.largest_difference <= 1e-5
    written = AutoTokenizer.from_pretrained(tmp_path / "export").apply_chat_template(
        [{"role": "user", "content": "where"}, {"role": "assistant", "content": "there"}], tokenize=False
    )
    assert written == "where there<eos>"


def test_adapters_and_several_criteria_are_folded_in(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path)
    model = reward_model(HeadSpec(kind="last", criteria={"overall": 1.0, "harmless": 0.5}))
    add_adapters(model.body, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, weight in model.body.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.05)
    parity = export_classifier(model, tokenizer, tmp_path / "export")
    assert parity.largest_difference <= 1e-5
    assert (tmp_path / "export/adapter/adapter_model.safetensors").is_file()


def test_an_ensemble_of_one_is_exported_with_both_scales(tmp_path: Path) -> None:
    tokenizer, ensemble = loaded(tmp_path), RewardEnsemble([reward_model()], "mean")
    ensemble.standardise(-0.5, 2.0)
    assert export_classifier(ensemble, tokenizer, tmp_path / "export").largest_difference <= 1e-5


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (HeadSpec(kind="mean"), "reads every token of a response"),
        (HeadSpec(kind="attention"), "reads every token of a response"),
        (HeadSpec(kind="mixed"), "reads every token of a response"),
        (HeadSpec(kind="sum"), "reads every token of a response"),
        (HeadSpec(kind="gated"), "reads log-probabilities too"),
        (HeadSpec(kind="last", spread=True, pessimism=1.0), "takes deviations off"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(tmp_path: Path, spec: HeadSpec, reason: str) -> None:
    tokenizer, model = loaded(tmp_path), reward_model(family="llama")
    model = RewardModel.from_policy(language_model(), spec, seed=0)
    assert reason in str(why_not_classifier(model, tokenizer))
    with pytest.raises(ConfigError, match=reason):
        export_classifier(model, tokenizer, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    model.save(tmp_path / "reward", tokenizer)
    assert load_reward_model(tmp_path / "reward").spec == spec


def test_heads_that_are_linear_all_the_same_are_not_refused(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path)
    for spec in (HeadSpec(kind="mixed", alpha=1.0), HeadSpec(kind="last", spread=True)):
        assert export_classifier(reward_model(spec), tokenizer, tmp_path / "export").largest_difference <= 1e-5


def test_an_ensemble_of_several_is_refused(tmp_path: Path) -> None:
    ensemble = RewardEnsemble([reward_model(), reward_model()], "mean")
    with pytest.raises(ConfigError, match=r"2 members, each with a body of its own.*ensemble\.distill"):
        export_classifier(ensemble, loaded(tmp_path), tmp_path / "export")


def test_a_tokenizer_that_transformers_replaces_by_the_architectures_is_found_out(tmp_path: Path) -> None:
    """`AutoTokenizer` reads every folder of type qwen2 with Qwen's own splitting, which takes numbers apart."""
    rows = [("The price of brooms?", "12 and 12.")]
    with pytest.raises(ConfigError, match="AutoTokenizer goes by the architecture"):
        export_classifier(reward_model(family="qwen2"), loaded(tmp_path), tmp_path / "export", rows)


def test_scores_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model()
    tokenizer = loaded(tmp_path)
    score = model.linear_score()
    monkeypatch.setattr(RewardModel, "linear_score", lambda _: score._replace(constant=score.constant + 1e-4))
    with pytest.raises(ConfigError, match=r"differ from ours by up to 0\.0001"):
        export_classifier(model, tokenizer, tmp_path / "export")
