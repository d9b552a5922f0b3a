"""Training that starts from a reward model: what it says before the first step, against transformers and itself."""

from pathlib import Path

import pytest
import torch
from support.foreign import chatting, foreign_folder
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_core.engine.batches import collate
from rlhf_core.errors import ConfigError
from rlhf_core.models.scoring.foreign import load_scoring_tokenizer
from rlhf_core.models.scoring.heads import HeadSpec
from rlhf_core.models.scoring.start import load_start, started_from

PROMPTS, RESPONSES = [[9, 20, 31], [40]], [[50, 61], [72, 83, 94]]


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return load_scoring_tokenizer(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_every_criterion_starts_as_the_classifier_scores(tmp_path: Path, family: str) -> None:
    folder = foreign_folder(tmp_path, family)
    start = load_start(folder, "last", tokenizer_of(folder))
    model = started_from(start, HeadSpec(kind="last", criteria={"overall": 1.0, "harmless": 0.5}), seed=3)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = zip(PROMPTS, RESPONSES, strict=True)
        expected = [plain(torch.tensor([[*prompt, *reply]])).logits[0, 0].item() for prompt, reply in rows]
        scores_BC = model.read(collate(PROMPTS, RESPONSES, pad_id=0)).scores_BC
    assert scores_BC[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert scores_BC[:, 1].tolist() == pytest.approx(expected, abs=1e-5)
    assert model.body is not start.body


@pytest.mark.parametrize("head", ["mean", "attention"])
def test_a_reward_model_of_ours_goes_on_from_its_raw_scores(tmp_path: Path, head: str) -> None:
    foreign_folder(tmp_path / "body")
    start = load_start(tmp_path / "body", "last", tokenizer_of(tmp_path / "body"))
    own = started_from(start, HeadSpec(kind=head), seed=0)
    with torch.no_grad():
        for weight in own.head.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    own.standardise(3.0, 2.0)
    tokenizer = chatting()
    own.save(tmp_path / "own", tokenizer)
    again = started_from(load_start(tmp_path / "own", head, tokenizer), HeadSpec(kind=head), seed=7)
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    with torch.no_grad():
        torch.testing.assert_close(again(batch), own.raw_scores(batch))


@pytest.mark.parametrize(
    ("family", "head", "says"),
    [
        ("llama", "mean", "has head 'last', not 'mean'. Fix: reward.head: last"),
        ("bert", "last", "has another body than|does more with a state than one linear map|no sequence classifier"),
    ],
)
def test_what_is_no_start_is_refused(tmp_path: Path, family: str, head: str, says: str) -> None:
    folder = foreign_folder(tmp_path, family)
    with pytest.raises(ConfigError, match=says):
        load_start(folder, head, tokenizer_of(folder))  # type: ignore[arg-type]


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path)
    other = chatting()
    other.add_tokens(["another"])
    with pytest.raises(ConfigError, match="another vocabulary than the SFT model's"):
        load_start(folder, "last", other)
