"""An exported model as a stranger meets it: a program of its own that knows torch, transformers, and the format.

`python -I stranger.py REQUEST ANSWER`, two JSON files. It imports nothing of this project, so that what it finds is
what anybody would find. For each row of a request it says what tokens the exported tokenizer makes of the prompt, what
the model writes greedily, and the log-probability that it gives to each token of a given response.

Greedy tokens are written in the precision of the folder; log-probabilities are computed in float64 where the format
allows it, so that rounding of float32 does not stand between what is compared.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROWS_AT_ONCE = 16

Row = dict[str, Any]


def main(request_file: str, answer_file: str) -> None:
    """Answer a request."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    with torch.no_grad():
        answer = {**READERS[request["reads"]](request), "program": program(request["reads"])}
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


def program(reads: str) -> str:
    """What the folder was read with, and its version."""
    from importlib.metadata import version

    name = {"onnx": "onnxruntime", "adapter": "peft"}.get(reads, "transformers")
    return f"{name} {version(name)}"


def read_transformers(request: dict[str, Any]) -> dict[str, Any]:
    """A folder of `save_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return written_and_weighed(model, AutoTokenizer.from_pretrained(folder, local_files_only=True), request)


def read_adapter(request: dict[str, Any]) -> dict[str, Any]:
    """Adapters on the folder that they belong to, by peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32, local_files_only=True)
    model = PeftModel.from_pretrained(base, request["folder"])
    tokenizer = AutoTokenizer.from_pretrained(request["folder"], local_files_only=True)
    return written_and_weighed(model, tokenizer, request)


def read_gguf(request: dict[str, Any]) -> dict[str, Any]:
    """One file with all, by transformers' own reader of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"gguf_file": request["file"], "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32, **named)
    return written_and_weighed(model, AutoTokenizer.from_pretrained(request["folder"], **named), request)


def read_onnx(request: dict[str, Any]) -> dict[str, Any]:
    """A graph without a cache, by onnxruntime: what it would write next after each token, in float32.

    The likeliest token after each prefix of a greedy response is its next token, or the graph writes another response.
    """
    import numpy as np

    onnxruntime = import_module("onnxruntime")  # of an extra that a stranger may lack
    from transformers import AutoTokenizer

    folder = Path(request["folder"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / request["file"], options, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    written, logprobs, behind = [], [], []
    for row in request["rows"]:
        ids = np.array([row["ids"] + row["response"]], dtype=np.int64)
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        values, lost, best = weighed(torch.from_numpy(logits), row)
        logprobs.append(values)
        behind.append(lost)
        written.append(best)
    return {"tokens": prompt_tokens(tokenizer, request), "written": written, "logprobs": logprobs, "behind": behind}


def read_classifier(request: dict[str, Any]) -> dict[str, Any]:
    """A reward model as a sequence classifier: the score of each dialogue, in float64."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = request["folder"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.eval().double()
    scores = []
    for row in request["rows"]:
        text = tokenizer.apply_chat_template(row["turns"], tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        logits_11 = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        scores.append(float(logits_11[0, 0]) + float(getattr(model.config, "score_shift", 0.0)))
    return {"scores": scores}


def written_and_weighed(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What a model of transformers makes of all rows: greedy tokens first, then log-probabilities in float64."""
    model.eval()
    written = greedy(model, request)
    model.double()
    found = [weighed(model(torch.tensor([row["ids"] + row["response"]])).logits, row) for row in request["rows"]]
    return {
        "tokens": prompt_tokens(tokenizer, request),
        "written": written,
        "logprobs": [values for values, _, _ in found],
        "behind": [lost for _, lost, _ in found],
    }


def greedy(model: Any, request: dict[str, Any]) -> list[list[int]]:
    """Tokens that `generate` writes, the end token included; nothing but the likeliest token each time."""
    from transformers import GenerationConfig

    ends, pad, rows = request["ends"], request["pad"], request["rows"]
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=request["new_tokens"], eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["ids"]))
    written: dict[int, list[int]] = {}
    for start in range(0, len(order), ROWS_AT_ONCE):
        numbers = order[start : start + ROWS_AT_ONCE]
        width = max(len(rows[number]["ids"]) for number in numbers)
        lacking = [width - len(rows[number]["ids"]) for number in numbers]
        ids = torch.tensor([[pad] * less + rows[number]["ids"] for number, less in zip(numbers, lacking, strict=True)])
        mask = torch.tensor([[0] * less + [1] * (width - less) for less in lacking])
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=plain)[:, width:].tolist()
        for number, tokens in zip(numbers, made, strict=True):
            last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
            written[number] = tokens[: last + 1]
    return [written[number] for number in range(len(rows))]


def weighed(logits_1SV: torch.Tensor, row: Row) -> tuple[list[float], list[float], list[int]]:
    """Log-probability of each response token, how far it is behind the likeliest, and the likeliest."""
    first = len(row["ids"]) - 1
    logprobs_RV = logits_1SV[0, first : first + len(row["response"])].double().log_softmax(-1)
    values_R = logprobs_RV[torch.arange(len(row["response"])), torch.tensor(row["response"], dtype=torch.long)]
    best_R, places_R = logprobs_RV.max(-1)
    return values_R.tolist(), (best_R - values_R).tolist(), places_R.tolist()


def prompt_tokens(tokenizer: Any, request: dict[str, Any]) -> list[list[int]]:
    """The prompts as the exported tokenizer writes them, by its chat template where it has one."""
    found = []
    for row in request["rows"]:
        if row["turns"] is None:
            found.append(tokenizer(row["text"])["input_ids"])
        else:
            ids = tokenizer.apply_chat_template(
                row["turns"], tools=row["tools"] or None, add_generation_prompt=True, return_dict=True
            )
            found.append(list(ids["input_ids"]))
    return found


READERS = {
    "hf": read_transformers,
    "adapter": read_adapter,
    "gguf": read_gguf,
    "onnx": read_onnx,
    "classifier": read_classifier,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
