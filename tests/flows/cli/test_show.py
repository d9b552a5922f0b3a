"""`rlhf data show`: the mask that is printed is the one that training has, held against transformers' own."""

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.templates import FAMILIES, TOOLS, WITH_TOOLS
from support.tokenizer import CHATML, byte_level
from transformers import LlamaConfig, PreTrainedTokenizerBase

from flows.cli.app import run_command

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is it?\nAisle?"},
    {"role": "assistant", "content": "In aisle F."},
    {"role": "user", "content": "And the price?"},
    {"role": "assistant", "content": "12 for a broom."},
]
ROWS: dict[str, dict[str, Any]] = {
    "demonstrations": {"prompt": "Where is it?", "response": "In aisle F."},
    "comparisons": {"prompt": "Where is it?", "chosen": "In aisle F.", "rejected": "No."},
    "votes": {"prompt": "Where is it?", "response_a": "F.", "response_b": "No.", "annotator": "a", "choice": "a"},
    "rankings": {"prompt": "Where is it?", "responses": ["In F.", "No.", "12"], "ranking": [1, 2, 3]},
    "graded": {"prompt": "Where is it?", "response": "In aisle F.", "score": 3},
    "prompts": {"prompt": "Where is it?"},
}
RESPONSES = {
    "demonstrations": ["In aisle F."],
    "comparisons": ["In aisle F.", "No."],
    "votes": ["F.", "No."],
    "rankings": ["In F.", "No.", "12"],
    "graded": ["In aisle F."],
    "prompts": [],
}


def folder_of(path: Path, template: str | None) -> PreTrainedTokenizerBase:
    """A model folder whose tokenizer has a template; what it holds of a model is never read."""
    tokenizer = byte_level(template)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    config.save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"no weights at all")
    tokenizer.save_pretrained(path)
    return tokenizer


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).write_text((Path(__file__).parents[3] / name).read_text())
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    monkeypatch.chdir(root)
    return root


def write(rows: Sequence[Any], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run_command(["data", "show", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_mask_of_a_dialogue_is_that_of_transformers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = folder_of(project / "model", MARKED)
    shown = asked(capsys, write([{"messages": MESSAGES}]), "--model", "model")
    theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (sequence,) = shown["rows"][0]["sequences"]
    length = len(sequence["ids"])
    assert sequence["ids"] == theirs["input_ids"][:length]
    assert sequence["mask"] == theirs["assistant_masks"][:length]
    assert not any(theirs["assistant_masks"][length:]), "what follows the last end token is written for nobody"
    assert shown["totals"]["tokens_learned"] == sum(theirs["assistant_masks"])
    assert "".join(sequence["tokens"]) == tokenizer.decode(theirs["input_ids"][:length])


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("kind", list(ROWS))
def test_each_kind_is_told_and_its_responses_are_learned(
    project: Path, capsys: pytest.CaptureFixture[str], kind: str, template: str | None
) -> None:
    tokenizer = folder_of(project / "model", template)
    space = "" if template else " "
    shown = asked(capsys, write([ROWS[kind]] * 2), "--model", "model", "--rows", "1")
    end = "<|im_end|>" if template else tokenizer.eos_token
    learned = [
        "".join(token for token, bit in zip(sequence["tokens"], sequence["mask"], strict=True) if bit)
        for sequence in shown["rows"][0]["sequences"]
    ]
    assert shown["kind"] == kind
    assert [text for text in learned if text] == [f"{space}{response}{end}" for response in RESPONSES[kind]]
    each = sum(len(tokenizer(f"{space}{text}", add_special_tokens=False)["input_ids"]) + 1 for text in RESPONSES[kind])
    assert shown["totals"]["tokens_learned"] == 2 * each, "of both rows, though one is printed"
    assert len(shown["rows"]) == 1


def test_transcripts_are_read_as_dialogues(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(project / "model", CHATML)
    start = "\n\nHuman: Where?\n\nAssistant: In F.\n\nHuman: And?\n\nAssistant:"
    shown = asked(capsys, write([{"chosen": f"{start} Yes.", "rejected": f"{start} No."}]), "--model", "model")
    texts = ["".join(sequence["tokens"]) for sequence in shown["rows"][0]["sequences"]]
    assert texts[0].endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>")


def test_calls_are_learned_and_answers_read(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(project / "model", FAMILIES["Llama 3"])
    shown = asked(capsys, write([{"messages": WITH_TOOLS, "tools": TOOLS}]), "--model", "model",
                  "--set", "model.max_prompt_tokens=2000", "--set", "model.max_response_tokens=200")  # fmt: skip
    (sequence,) = shown["rows"][0]["sequences"]
    learned = "".join(token for token, bit in zip(sequence["tokens"], sequence["mask"], strict=True) if bit)
    assert learned == '{"name": "stock", "parameters": {"item": "a \\"big\\" lamp"}}<|eot_id|>3 of them.<|eot_id|>'
    assert "ipython" in "".join(sequence["tokens"])


def test_rows_that_a_template_refuses_are_named_and_counted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(project / "model", FAMILIES["Gemma 3"])
    file = write([{"messages": WITH_TOOLS}, ROWS["demonstrations"]])
    shown = asked(capsys, file, "--model", "model")
    assert "Conversation roles must alternate" in shown["rows"][0]["refused"]
    assert list(shown["totals"]["rows_refused"].values()) == [1]
    assert shown["totals"]["rows_without_targets"] == 1


def test_what_is_learned_shows_without_colour_too(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(project / "model", CHATML)
    arguments = ["data", "show", write([{"messages": MESSAGES}]), "--model", "model"]
    assert run_command(arguments) == 0
    plain = capsys.readouterr().out
    learned = re.findall("⟦(.*?)⟧", plain, re.DOTALL)
    spoken = [text.replace("|", "") for text in learned[1:]]  # the first brackets are those of the legend
    assert spoken == ["In aisle F.<im_end>", "12 for a broom.<im_end>"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run_command(arguments) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[1;32m" in coloured
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_what_is_cut_is_counted_and_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = folder_of(project / "model", CHATML)
    file = write([ROWS["demonstrations"] | {"prompt": "Where is it? " * 9}])
    limits = ["--set", "model.max_prompt_tokens=20", "--set", "model.max_response_tokens=2"]
    shown = asked(capsys, file, "--model", "model", *limits)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": ("Where is it? " * 9).strip()}], add_generation_prompt=True, return_dict=True
    )["input_ids"]  # fmt: skip
    reply = [*tokenizer("In aisle F.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert shown["totals"]["tokens_cut_from_prompts"] == len(whole) - 20
    assert shown["totals"]["tokens_cut_from_responses"] == len(reply) - 2
    assert shown["totals"]["tokens_learned"] == 2
    assert run_command(["data", "show", file, "--model", "model", *limits]) == 0
    said = capsys.readouterr().out
    assert f"cut: {len(whole) - 20} tokens of the prompt's beginning" in said
    assert "1 of 1 responses lost their end to model.max_response_tokens" in said
    assert "(model.max_response_tokens 2)" in said


def test_a_row_is_found_by_its_number_and_by_its_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(project / "model", CHATML)
    Path("rows.jsonl").write_text(
        '{"prompt": "a", "response": "b"}\n\n{"prompt": 3}\n{"prompt": "c", "response": "d"}\n'
    )
    by_row = asked(capsys, "rows.jsonl", "--model", "model", "--row", "3")
    by_line = asked(capsys, "rows.jsonl", "--model", "model", "--line", "4")
    assert by_row["rows"] == by_line["rows"]
    assert by_row["rows"][0]["place"] == "line 4"
    bad = asked(capsys, "rows.jsonl", "--model", "model", "--row", "2")
    assert "prompt: number" in bad["rows"][0]["fault"]
    assert bad["totals"]["rows_of_another_form"] == {bad["rows"][0]["fault"]: 1}
    assert run_command(["data", "show", "rows.jsonl", "--model", "model", "--row", "9"]) == 2


def test_pairs_that_are_equal_once_cut_teach_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(project / "model", CHATML)
    file = write([ROWS["comparisons"] | {"rejected": "In aisle 12."}])
    assert run_command(["data", "show", file, "--model", "model", "--set", "model.max_response_tokens=2"]) == 4
    told = capsys.readouterr()
    assert "1 of 1 pairs have two responses that are the same once they are cut" in told.out
    assert "nothing of its 1 rows would be learned" in told.err
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.jsonl", "--model", "model"], 4, "no such file"),
        (["rows.txt", "--model", "model"], 4, "unknown format"),
        (["rows.jsonl", "--model", "nowhere"], 7, "no such folder"),
        (["rows.jsonl", "--model", "bare"], 7, "tokenizer.json"),
        (["rows.jsonl", "--model", "plain", "--set", "model.chat=template"], 2, "has no chat template"),
        (["rows.jsonl"], 2, "--model"),
        (["odd.jsonl", "--model", "model"], 4, "fit no kind"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    write([ROWS["demonstrations"]])
    write([{"speech": 3}], "odd.jsonl")
    Path("rows.txt").write_text("text")
    folder_of(project / "model", CHATML)
    folder_of(project / "plain", None)
    folder_of(project / "bare", None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (project / "bare" / name).unlink()
    assert run_command(["data", "show", *arguments]) == code
    told = capsys.readouterr()
    assert said in told.err
    assert (told.out, len(told.err.splitlines())) == ("", 1)
