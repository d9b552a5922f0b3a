"""Model folders from elsewhere: what must be in one, and what must not. Checked before anything of it is loaded."""

import json
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, EnvironmentProblem

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_generate")


def check_model_folder(folder: Path | str) -> None:
    """Refuse a folder that lacks files or could run code; all that is missing is named at once.

    Only local files, only safetensors (a pickle can run code when it is read), no model code of the folder's own.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: a configuration cannot be read, or asks for code.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EnvironmentProblem(f"{folder}: there is no such folder. Fix: a folder written by `save_pretrained`")
    missing = _missing(folder)
    if missing:
        raise EnvironmentProblem(
            f"{folder}: missing {'; '.join(missing)}. Fix: where you trust the model, load it and write model and "
            "tokenizer there with `save_pretrained`"
        )
    for name in CONFIGS:
        if (folder / name).is_file():
            _refuse_code(folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        ConfigError: it is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}). Fix: copy or save the model again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object. Fix: copy or save the model again")
    return content


def _missing(folder: Path) -> list[str]:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    weights, index = (folder / name for name in WEIGHTS)
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing += [name for name in shards if not (folder / name).is_file()]
    elif not weights.is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        unread = f" ({', '.join(pickles)} is not read: a pickle can run code)" if pickles else ""
        missing.append(f"{weights.name}{unread}")
    if not any((folder / name).is_file() for name in TOKENIZER):
        missing.append(TOKENIZER[0])
    return missing


def _refuse_code(path: Path) -> None:
    content = read_json(path)
    found = [key for key in CODE_KEYS if content.get(key)]
    if found:
        raise ConfigError(
            f"{path}: {', '.join(found)}: the folder wants to run code of its own, which is refused. "
            "Fix: use an architecture that transformers itself has"
        )
