"""Stage `sft` on a pretrained folder: chat template, whole dialogues, adapters; and DVC sees the folder change."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_project
from safetensors.torch import load_file
from support.project import change_sections, edited_yaml
from support.tokenizer import CHATML, byte_level
from support.tracking import git
from support.warm_processes import run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rlhf_core.data.cleaning.splits import is_heldout
from rlhf_core.errors import ConfigError
from rlhf_core.models.policy import load_policy
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.identity import prompt_group
from rlhf_core.text.tokenizer import encode_prompt, encode_response, load_tokenizer
from rlhf_core.text.transcripts import replies_of
from tasks.lineage.manifest import build_manifest
from tasks.lineage.versioning import create_run_worktree, lock_entry
from tasks.params import check_params, parse_yaml

NAMES = ("lamp", "broom", "chair", "table", "clock", "plant", "stool", "mirror", "rug", "shelf", "vase", "desk")


def dialogues() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": f"Hello, where is the {name}?"},
                {"role": "assistant", "content": f"In aisle {number}."},
                {"role": "user", "content": f"And the price of a {name}?"},
                {"role": "assistant", "content": f"{number} coins."},
            ],
            "task": "price" if number % 3 else "place",
        }
        for name in NAMES
        for number in range(2, 6)
    ]


def write_params(project: Path, **sections: dict[str, Any]) -> None:
    with edited_yaml(project / "params.yaml") as content:
        content["data"] = {"demonstrations": "data/dialogues.jsonl", "heldout_share": 0.35}
        content["model"].update(source="folder", path="models/own", max_prompt_tokens=200, max_response_tokens=24)
        content["sft"].update(max_steps=12, batch_size=8, learning_rate=0.02, eval_every=6, heldout_share=0.1)
    change_sections(project, **sections)


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with dialogues as data, a folder of one's own, and its stage `validate` done."""
    project = make_project(tmp_path_factory.mktemp("dialogues") / "project")
    lines = [json.dumps(row) + "\n" for row in dialogues()]
    (project / "data/dialogues.jsonl").write_text("".join(lines))
    tokenizer = byte_level(CHATML)
    tokenizer.save_pretrained(project / "models/own")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(project / "models/own")
    write_params(project)
    done = run_stage(project, "validate")
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture
def project(validated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(validated, tmp_path / "project", symlinks=True))


def figures(project: Path) -> dict[str, Any]:
    return json.loads((project / "reports/metrics/sft.json").read_text())


def test_dialogues_are_learned_in_the_form_of_the_template(project: Path) -> None:
    write_params(project, sft={"batches": {"by": "tokens", "tokens": 400, "balance": "task"}, "hard_examples": {}})
    done = run_stage(project, "sft")
    assert done.returncode == 0, done.stderr
    folder = project / "artifacts/sft/model"
    assert figures(project)["pad_is_eos"] is False, "the end of a text pads, the end of a turn ends"
    tokenizer = load_tokenizer(folder)
    prompt = encode_prompt(tokenizer, "Be kind.\n\nHuman: Hello\n\nAssistant:", 200)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert prompt == theirs
    end = encode_response(tokenizer, "x", 9)[-1]
    assert end in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    rows = [row for row in (project / "reports/plots/sft.csv").read_text().splitlines()[1:] if row]
    assert len(rows) == 12
    assert "loss/unweighted" in (project / "reports/plots/sft.csv").read_text().splitlines()[0]


def test_adapters_are_trained_and_written_merged_and_alone(project: Path) -> None:
    write_params(project, model={"lora": {"rank": 4, "alpha": 8}})
    done = run_stage(project, "sft")
    assert done.returncode == 0, done.stderr
    folder, own = project / "artifacts/sft/model", load_policy(project / "models/own")
    merged = load_policy(folder)
    assert torch.equal(merged.lm_head.weight, own.lm_head.weight), "what has no adapter is as it was"
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, own.model.layers[0].mlp.up_proj.weight)
    assert len(load_file(folder / "adapter/adapter_model.safetensors")) == 2 * 7 * 2
    from peft import PeftModel

    ids = torch.tensor([encode_prompt(load_tokenizer(folder), "Hello", 200)])
    adapters = load_file(folder / "adapter/adapter_model.safetensors").values()
    assert figures(project)["trained_parameters"] == sum(tensor.numel() for tensor in adapters)
    assert figures(project)["parameters"] == sum(parameter.numel() for parameter in merged.parameters())
    alone = PeftModel.from_pretrained(own, folder / "adapter")
    torch.testing.assert_close(alone(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(plain(ids).logits, merged(ids).logits)


def test_base_weights_in_four_bits_are_published_whole_with_the_same_bytes(project: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra `quantised`) is not installed")
    write_params(project, model={"lora": {"rank": 4, "alpha": 8}, "base_weights": "nf4"})
    digests = []
    for _ in range(2):
        done = run_stage(project, "sft")
        assert done.returncode == 0, done.stderr
        digests.append(tree_digest(project / "artifacts/sft/model"))
    assert digests[0] == digests[1]
    folder, own = project / "artifacts/sft/model", load_policy(project / "models/own")
    published = load_policy(folder)
    assert torch.equal(published.lm_head.weight, own.lm_head.weight)
    assert figures(project)["parameters"] == sum(parameter.numel() for parameter in own.parameters())
    rounded = published.model.layers[0].mlp.up_proj.weight - own.model.layers[0].mlp.up_proj.weight
    assert torch.linalg.matrix_rank(rounded) > 4, "more than an adapter of rank 4: the base was rounded"


@pytest.mark.parametrize(("turns", "learns_first"), [("all", True), ("last", False)])
def test_earlier_replies_are_learned_where_all_turns_are(
    project: Path, turns: str, learns_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer is given, token by token, for the first dialogue."""
    from rlhf_core.data.batching.examples import Example
    from tasks import paths
    from tasks.frame.definition import stage_definition
    from tasks.frame.stage import Progress, Stage
    from tasks.params import load_params
    from tasks.stages.sft import run as sft
    from tasks.tables import SCHEMAS, write_table

    write_params(project, sft={"turns": turns})
    monkeypatch.chdir(project)
    params, progress = load_params(project / "params.yaml"), Progress(project / "progress.jsonl")
    stage = Stage(stage_definition(project, "sft"), params, project, project / "out", progress)
    tokenizer = load_tokenizer(project / "models/own")
    first = "Be kind.\n\nHuman: Hello, where is the lamp?\n\nAssistant:"
    prompt = f"{first} In aisle 2.\n\nHuman: And the price?\n\nAssistant:"
    row = {"id": "d", "prompt": prompt, "response": "2 coins.", "task": "t", "source": "file", "split": "train"}
    write_table(paths.VALIDATE / "demonstrations.parquet", [row], SCHEMAS["demonstrations"])
    write_table(paths.VALIDATE / "heldout_replies.parquet", [], SCHEMAS["heldout_replies"])
    given = []

    class GivenToTheTrainer(Exception):
        pass

    def trainer(*arguments: object, **more: object) -> None:
        given.extend(one for one in (*arguments, *more.values()) if isinstance(one, list) and one)
        raise GivenToTheTrainer

    monkeypatch.setattr(sft, "train_sft", trainer)
    with pytest.raises(GivenToTheTrainer):
        sft.run(stage)
    (found,) = given
    p1, r1 = encode_prompt(tokenizer, first, 200), encode_response(tokenizer, "In aisle 2.", 24)
    p2, r2 = encode_prompt(tokenizer, prompt, 200), encode_response(tokenizer, "2 coins.", 24)
    if learns_first:
        between = p2[len(p1) + len(r1) :]
        mask = [1] * len(r1) + [0] * len(between) + [1] * len(r2)
        assert found == [Example(p1, [*r1, *between, *r2], mask, "t")]
        written = tokenizer.decode([token for token, counts in zip(found[0].response, mask, strict=True) if counts])
        assert written == "In aisle 2.<|im_end|>2 coins.<|im_end|>"
    else:
        assert found == [Example(p2, r2, None, "t")]


def dvc(project: Path, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_dvc_sees_a_folder_that_was_changed_in_place(project: Path) -> None:
    dvc(project, "init", "--no-scm", "--quiet")
    dvc(project, "commit", "--force", "--quiet", "validate")
    dvc(project, "repro", "--single-item", "--quiet", "sft")
    assert json.loads(dvc(project, "status", "--json", "sft")) == {}
    weights = project / "models/own/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert json.loads(dvc(project, "status", "--json", "sft")) == {
        "sft": [{"changed deps": {"models/own": "modified"}}]
    }


def test_a_run_in_a_worktree_reads_the_same_folder_and_writes_the_same_bytes(project: Path) -> None:
    """A relative path: git ignores the folder, so the worktree has it from the main checkout alone."""
    git(project, "init", "--quiet")
    dvc(project, "init", "--quiet")
    dvc(project, "add", "--quiet", "data")
    dvc(project, "commit", "--force", "--quiet", "validate")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "start")
    worktree = create_run_worktree(project, "own", (project / "params.yaml").read_text(), {})
    dvc(worktree, "checkout", "--quiet", "artifacts/validate")
    assert not (worktree / "artifacts/sft").exists()
    for root in (project, worktree):
        dvc(root, "repro", "--single-item", "--no-run-cache", "--quiet", "sft")
        assert json.loads(dvc(root, "status", "--json", "sft")) == {}
    assert tree_digest(worktree / "artifacts/sft") == tree_digest(project / "artifacts/sft")
    assert lock_entry(worktree, "sft") == lock_entry(project, "sft")
    assert "models/own" in {dep["path"] for dep in lock_entry(worktree, "sft")["deps"]}
    assert build_manifest(worktree, "sft")["git"]["files"].keys() == {"dvc.lock"}


def test_adapters_beside_random_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.stages names sft, but adapters beside random weights learn little"):
        check_params(parse_yaml("model:\n  lora: {rank: 4}\n", "p"), "p")
    assert check_params(parse_yaml("model:\n  lora: {rank: 4, stages: [reward, align]}\n", "p"), "p").model.lora


def test_replies_that_the_template_shortens_are_left_out_counted_and_told(project: Path) -> None:
    """In training as in the held-out loss; a template that shortens every reply leaves nothing to learn from."""
    write_params(project, sft={"turns": "all", "heldout_share": 0.4})
    for name, number in (("price", "3 coins."), ("place", "In aisle ")):
        tokenizer = byte_level(CHATML.replace("message['content']", f"message['content'].split({number!r})[-1]"))
        tokenizer.save_pretrained(project / "models/own")
        done = run_stage(project, "sft")
        assert done.returncode == 0, done.stderr
        said = figures(project)
        train = [row for row in read_demonstrations(project) if row["split"] == "train"]
        replies = [text for row in train for _, text in replies_of(row["prompt"], row["response"])]
        assert said["responses_encoded"] == len(replies)
        assert 0 < said["responses_rewritten"] == sum(number in text for text in replies) < len(replies), name
        assert done.stdout.count("warning: ") == 1
        assert f"{said['responses_rewritten']} of {len(replies)} responses are not written whole" in done.stdout
        own = [[text for _, text in replies_of(row["prompt"], row["response"])] for row in train]
        silent = sum(all(number in text for text in texts) for texts in own)
        assert said.get("demonstrations_without_targets", 0) == silent
        assert (f"{silent} of {len(train)} demonstrations teach nothing" in done.stdout) == (silent > 0)
    byte_level(CHATML.replace("message['content']", "message['content'].split(' ')[-1]")).save_pretrained(
        project / "models/own"
    )
    done = run_stage(project, "sft")
    assert done.returncode == 4
    count = sum(is_heldout(f"sft {prompt_group(row['prompt'])}", 0.4) for row in train)
    assert f"demonstrations.parquet: no token to learn in {len(train) - count} demonstrations" in done.stderr
    assert "responses are not written whole by chat template or tokenizer" in done.stderr
    assert done.stderr.rstrip().endswith("Fix: model.chat: plain, or another template")


def read_demonstrations(project: Path) -> list[dict[str, Any]]:
    return pq.read_table(project / "artifacts/validate/demonstrations.parquet").to_pylist()
