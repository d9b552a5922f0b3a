"""The LoRA adapters of a policy alone, for peft, on the model that they were trained on."""

import shutil
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.model_folder import read_json
from rlhf_core.models.adapters import CONFIG_FILE, FOLDER, WEIGHTS_FILE
from rlhf_core.state.atomic import write_json
from tasks.exporting.form import Source, WrittenForm
from tasks.exporting.hf import prompt_lines
from tasks.exporting.subject import Subject
from tasks.lineage.provenance import hub_source

OF_THE_TOKENIZER = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)


def write_adapter(source: Source, folder: Path) -> WrittenForm:
    """Copy adapters and tokenizer; the base is named where anybody can fetch it from a hub.

    Raises:
        ConfigError: the version has no adapters.
        EnvironmentProblem: what they were trained on is not there, so that nothing could be held against them.
    """
    subject = source.subject
    adapters = subject.folder / FOLDER
    if not adapters.is_dir():
        raise ConfigError(f"{subject.reference}: was trained without adapters (model.lora). Fix: --format hf")
    named, base = _base(subject)
    shutil.copyfile(adapters / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, read_json(adapters / CONFIG_FILE) | _where(subject))
    for pattern in OF_THE_TOKENIZER:
        for path in sorted(subject.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    limits = (
        f"adapters alone: they belong to {named} and to no other model",
        "added in each pass and not folded in, they differ from the registered version by rounding",
    )
    return WrittenForm(
        named={"base": str(base)}, limits=limits, loading=_loading(source, named), said={"adapter_base": named}
    )


def _base(subject: Subject) -> tuple[str, Path]:
    """What the adapters were trained on, in words, and its folder here."""
    if subject.base is not None:
        return f"the registered version {subject.base[0]}", subject.base[1]
    note = subject.pretrained
    if note is None:
        raise EnvironmentProblem(f"{subject.reference}: what its adapters were trained on is in no registry. Fix: hf")
    folder = subject.home / note["path"]
    if not folder.is_dir():
        raise EnvironmentProblem(
            f"{subject.reference}: {folder}, which its adapters were trained on, is gone. Fix: put it back as it was"
        )
    commit = f" at {note['commit'][:12]}" if "commit" in note else ""
    return f"the pretrained model {note['source']}{commit}", folder


def _where(subject: Subject) -> dict[str, Any]:
    """Keys by which peft finds the base by itself: a repository at its commit, and nothing where it is in none.

    A name that is in no repository would be looked up there all the same, and might be somebody else's.
    """
    found = None if subject.base is not None else hub_source(subject.pretrained)
    if found is None:
        return {"base_model_name_or_path": None}
    return {"base_model_name_or_path": found[0], "revision": found[1]}


def _loading(source: Source, named: str) -> str:
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("BASE")  # {named}
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
{prompt_lines(source)}
written = model.generate(**inputs, do_sample=False, max_new_tokens={source.subject.limit("max_response_tokens")})
```"""
