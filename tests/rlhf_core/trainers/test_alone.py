"""The page for those who want the trainers alone: its programs are taken from it and run, one after the other."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_core.engine.batches import collate
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, load_tokenizer, train_tokenizer

PAGE = (Path(__file__).parents[3] / "docs/trainers/alone.md").read_text()
PROGRAMS = {"SFT": 0, "Reward model": 1, "DPO": 2, "PPO": 3}
MOST_LINES = 15
NAMES = ("lamp", "broom", "chair", "table", "clock", "plant", "stool", "mirror", "rug", "shelf", "vase", "desk")
ROWS = [(f"Where is the {name} {size}?", f"In aisle {'ABC'[len(name) % 3]}.") for size in "12345" for name in NAMES]


def program(title: str) -> str:
    """The code of a section of the page."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return code


def examples_of_rows() -> dict[str, dict[str, str]]:
    """File name -> the row that the page shows for it."""
    shown = re.findall(r"^`(\w+\.jsonl)`[^`]*```json\n(.*?)\n```", PAGE, flags=re.MULTILINE)
    return {name: json.loads(row) for name, row in shown}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of random weights and rows in the form of the page, the page's own first."""
    folder = tmp_path_factory.mktemp("alone")
    tokenizer = train_tokenizer([text for row in ROWS for text in row], 400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=1024,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "models/own")
    tokenizer.save_pretrained(folder / "models/own")
    made: Mapping[str, list[dict[str, str]]] = {
        "demonstrations.jsonl": [
            {"prompt": prompt, "response": text}
            for number, (prompt, right) in enumerate(ROWS)
            for text in (right, "I do not know.")[: 1 + number % 2]
        ],
        "pairs.jsonl": [{"prompt": prompt, "chosen": right, "rejected": "I do not know."} for prompt, right in ROWS],
        "prompts.jsonl": [{"prompt": prompt} for prompt, _ in ROWS],
    }
    for name, first in examples_of_rows().items():
        assert all(row.keys() == first.keys() for row in made[name])
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in [first, *made[name]]))
    assert made.keys() == examples_of_rows().keys()
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, dict[str, Any]]:
    """What each program has defined at its end; they run in the order of the page, in the folder of the rows."""
    ended: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for title in PROGRAMS:
            ended[title] = {}
            exec(compile(program(title), f"docs/trainers/alone.md: {title}", "exec"), ended[title])
    return ended


@pytest.mark.parametrize("title", PROGRAMS)
def test_each_program_has_fifteen_lines_at_most(title: str) -> None:
    lines = [line for line in program(title).splitlines() if line.strip()]
    assert 5 < len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= 120
    assert not any(line.startswith((" ", "#")) for line in lines)


def history(ended: Mapping[str, Any], name: str) -> list[float]:
    return [row[name] for row in ended["state"].history if name in row]


def test_sft_learns_the_rows_and_writes_a_folder(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    losses = history(ran["SFT"], "loss/train")
    assert len(losses) == 100
    assert losses[0] == pytest.approx(math.log(len(ran["SFT"]["tokenizer"])), rel=0.05), "random weights know nothing"
    assert losses[-1] < 1.0, "some questions have two answers"
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out/sft", local_files_only=True)
    for name, weight in ran["SFT"]["model"].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_the_reward_model_prefers_what_was_chosen(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    model, tokenizer = RewardModel.load(folder / "out/reward"), load_tokenizer(folder / "out/reward")
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in ROWS], 99)
    with torch.no_grad():
        right, wrong = (
            model(collate(prompts, encode_responses(tokenizer, texts, 99), tokenizer.pad_token_id))
            for texts in ([text for _, text in ROWS], ["I do not know."] * len(ROWS))
        )
    assert (right > wrong).float().mean() > 0.95
    both = torch.cat([right, wrong])
    assert (both.mean().item(), both.std(correction=0).item()) == (pytest.approx(0, abs=0.1), pytest.approx(1, abs=0.1))


def test_dpo_starts_at_ln_2_and_moves_to_what_was_chosen(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    losses = history(ran["DPO"], "loss/train")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    assert (folder / "out/dpo/model.safetensors").is_file()


def test_ppo_writes_what_the_reward_model_likes(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    scores = history(ran["PPO"], "reward/score")
    assert len(scores) == 16
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.2
    assert (folder / "out/ppo/model.safetensors").is_file()
