"""Reward models exported as plain sequence classifiers: the same scores for a stranger, or a line that says why not."""

import json
import subprocess
import sys

import pytest
import torch
from support.exporting import PROMPTS, TEXTS, make_reward

from rlhf_core.engine.batches import collate
from rlhf_core.errors import ConfigError
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, load_tokenizer
from tasks.exporting.bundle import verify_folder
from tasks.exporting.export import Wish, export

STRANGER = """
import json, sys
for name in ("rlhf_core", "tasks", "flows"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = []
for prompt, response in json.loads(sys.argv[2]):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    found.append(logits[0, 0].item() + getattr(model.config, "score_shift", 0.0))
print(json.dumps(found))
"""


def silent(line):
    """Progress that nobody reads."""


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_process_that_cannot_import_the_project_gives_the_same_scores(tmp_path, chat):
    subject = make_reward(tmp_path, "last", chat=chat)
    said = export(subject, tmp_path / "out", Wish(), silent)
    assert (said["parity"]["what"], said["parity"]["rows"]) == ("scores", 24)
    assert said["parity"]["largest"] <= 1e-5
    assert verify_folder(tmp_path / "out").is_whole
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| pairwise_accuracy | 0.64 | 0.6 to 0.68 |" in card

    rows = [[prompt, response] for prompt, response in zip(PROMPTS, TEXTS, strict=False)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "out"), json.dumps(rows)],
        cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, tokenizer = RewardModel.load(subject.folder), load_tokenizer(subject.folder)
    batch = collate(
        encode_prompts(tokenizer, [row[0] for row in rows], 200),
        encode_responses(tokenizer, [row[1] for row in rows], 200),
        tokenizer.pad_token_id,
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["mean", "gated"])
def test_scores_that_no_such_class_has_are_said_to_be(tmp_path, head):
    subject = make_reward(tmp_path, head)
    with pytest.raises(ConfigError, match="rlhf-reward/3: no sequence classifier has its scores: "):
        export(subject, tmp_path / "out", Wish(), silent)
    with pytest.raises(ConfigError, match="a reward model has no form gguf"):
        export(subject, tmp_path / "out", Wish(format="gguf"), silent)
    assert not (tmp_path / "out").exists()
