"""Stages `sft` and `generate` as processes, from the demo's configuration and from a folder of one's own."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.project import edited_yaml
from support.warm_processes import run_stage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlhf_core.data.cleaning.splits import is_heldout
from rlhf_core.engine.batches import collate
from rlhf_core.models.policy import load_policy
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.identity import prompt_group
from rlhf_core.text.tokenizer import decode_response, encode_prompt, encode_response, load_tokenizer
from tasks.params import load_params
from tasks.tables import SCHEMAS


@pytest.fixture
def project(finished_project: Path, tmp_path: Path) -> Path:
    """A copy of the finished project."""
    return Path(shutil.copytree(finished_project, tmp_path / "project", symlinks=True))


def change_params(project: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with edited_yaml(project / "params.yaml") as content:
        change(content)


def metrics(project: Path, stage: str) -> dict[str, Any]:
    return json.loads((project / f"reports/metrics/{stage}.json").read_text())


def pretrained_folder(folder: Path) -> Path:
    """A model and tokenizer as somebody else would have saved them: other control tokens, no pad token, untied."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["a tokenizer of its own"],
        trainers.BpeTrainer(special_tokens=["<|start|>", "<|stop|>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|start|>", eos_token="<|stop|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attention_dropout=0.1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_figures_of_sft_are_those_of_its_outputs(finished_project: Path) -> None:
    figures = metrics(finished_project, "sft")
    demonstrations = pq.read_table(finished_project / "artifacts/validate/demonstrations.parquet").to_pylist()
    train = [row for row in demonstrations if row["split"] == "train"]
    assert figures["num_demonstrations"] + figures["num_heldout"] == len(train)
    assert 0 < figures["num_heldout"] < 0.15 * len(train)
    folder = finished_project / "artifacts/sft/model"
    assert figures["vocab_size"] == len(load_tokenizer(folder)) <= 400
    assert figures["parameters"] == sum(parameter.numel() for parameter in load_policy(folder).parameters())
    assert figures["trained_parameters"] == figures["parameters"]
    assert figures["steps"] == 24
    curves = (finished_project / "reports/plots/sft.csv").read_text().splitlines()
    assert curves[0] == "step,loss/heldout,loss/train,optim/grad_norm,optim/learning_rate,optim/not_finite"
    assert len(curves) == 25
    first, last = float(curves[1].split(",")[2]), float(curves[-1].split(",")[2])
    assert last < first - 0.5, "24 steps already learn something"


def test_the_heldout_loss_is_that_of_the_published_model_and_lies_in_its_interval(finished_project: Path) -> None:
    """Asked of transformers itself, one demonstration after another."""
    rows = pq.read_table(finished_project / "artifacts/validate/demonstrations.parquet").to_pylist()
    folder = finished_project / "artifacts/sft/model"
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    share = load_params(finished_project / "params.yaml").sft.heldout_share
    kept = [row for row in rows if row["split"] == "train" and is_heldout(f"sft {prompt_group(row['prompt'])}", share)]
    nats, tokens = 0.0, 0
    for row in kept:
        prompt = encode_prompt(tokenizer, row["prompt"], 160)
        reply = encode_response(tokenizer, row["response"], 56)
        labels = torch.tensor([[-100] * len(prompt) + reply])
        nats += model(torch.tensor([prompt + reply]), labels=labels).loss.item() * len(reply)
        tokens += len(reply)
    figures = metrics(finished_project, "sft")
    assert figures["num_heldout"] == len(kept)
    assert figures["heldout_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["heldout_loss_low"] < figures["heldout_loss"] < figures["heldout_loss_high"]
    assert figures["heldout_loss_high"] < 1.5 * figures["heldout_loss_low"]


def test_samples_are_greedy_and_of_prompts_that_were_not_learned_from(finished_project: Path) -> None:
    samples = json.loads((finished_project / "artifacts/sft/samples.json").read_text())
    figures = metrics(finished_project, "sft")
    assert 0 < len(samples) <= min(8, figures["num_heldout"])
    folder = finished_project / "artifacts/sft/model"
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    one = samples[0]
    assert set(one) == {"prompt", "reference", "response"}
    ids = encode_prompt(tokenizer, one["prompt"], 160)
    greedy = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=56)[0, len(ids) :].tolist()
    assert decode_response(tokenizer, greedy) == one["response"]


def test_generated_rows_carry_the_models_own_log_probabilities(finished_project: Path) -> None:
    table = pq.read_table(finished_project / "artifacts/generate/responses.parquet")
    assert table.schema.names == SCHEMAS["responses"].names
    rows = table.to_pylist()
    figures = metrics(finished_project, "generate")
    assert figures["num_responses"] == len(rows) == (40 + 20) * 4
    assert Counter(row["split"] for row in rows) == {"train": 160, "heldout": 80}
    assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 60
    assert figures["response_tokens"] == pytest.approx(sum(len(row["response_ids"]) for row in rows) / len(rows))
    assert figures["finished_share"] == pytest.approx(sum(row["finished"] for row in rows) / len(rows))
    model = load_policy(finished_project / "artifacts/sft/model")
    tokenizer = load_tokenizer(finished_project / "artifacts/sft/model")
    some = rows[:8]
    batch = collate(
        [encode_prompt(tokenizer, row["prompt"], 160) for row in some], [row["response_ids"] for row in some], 0
    )
    logprobs = response_logprobs(model, batch)
    for place, row in enumerate(some):
        expected = torch.tensor(row["logprobs"], dtype=torch.float32)
        torch.testing.assert_close(logprobs[place, : len(expected)], expected, atol=3e-5, rtol=0)
        assert row["response"] == decode_response(tokenizer, row["response_ids"])


def test_generate_gives_the_same_bytes_again(project: Path) -> None:
    before = tree_digest(project / "artifacts/generate")
    shutil.rmtree(project / "artifacts/generate")
    assert run_stage(project, "generate").returncode == 0
    assert tree_digest(project / "artifacts/generate") == before


def test_no_prompts_ask_for_no_responses(project: Path) -> None:
    change_params(project, lambda params: params["generate"].update(num_prompts=0, num_heldout_prompts=0))
    assert run_stage(project, "generate").returncode == 0
    assert pq.read_table(project / "artifacts/generate/responses.parquet").num_rows == 0
    assert metrics(project, "generate")["num_responses"] == 0
    assert metrics(project, "generate")["mean_logprob"] is None


def test_a_local_folder_goes_through_sft_and_generate(project: Path) -> None:
    own = pretrained_folder(project / "pretrained")
    change_params(project, lambda params: params["model"].update(source="folder", path="pretrained"))
    done = run_stage(project, "sft")
    assert done.returncode == 0, done.stderr
    figures = metrics(project, "sft")
    assert (figures["vocab_size"], figures["pad_is_eos"]) == (len(load_tokenizer(own)), True)
    trained, start = load_policy(project / "artifacts/sft/model"), load_policy(own)
    assert trained.config.model_type == "qwen2"
    assert trained.config.attention_dropout == 0.0
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert (project / "artifacts/sft/model/tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    done = run_stage(project, "generate")
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(project / "artifacts/generate/responses.parquet").to_pylist()
    stop = load_tokenizer(own).eos_token_id
    assert all(row["finished"] == (row["response_ids"][-1] == stop) for row in rows)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ("missing", 7, "missing config.json; model.safetensors; tokenizer.json"),
        ("code", 2, "auto_map: the folder wants to run code of its own"),
        ("short", 2, "max_prompt_tokens and max_response_tokens make 600, this model reads 512"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(project: Path, damage: str, code: int, words: str) -> None:
    folder = pretrained_folder(project / "pretrained")
    change_params(project, lambda params: params["model"].update(source="folder", path="pretrained"))
    if damage == "missing":
        shutil.rmtree(folder)
        folder.mkdir()
    elif damage == "code":
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "auto_map": {"AutoModel": "evil.Model"}}))
    else:
        change_params(project, lambda params: params["model"].update(max_prompt_tokens=544))
    before = tree_digest(project / "artifacts/sft")
    done = run_stage(project, "sft")
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert tree_digest(project / "artifacts/sft") == before, "what stood there stays"
