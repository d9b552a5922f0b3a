"""Model folders from elsewhere: what must be in one, and what must not. Checked before anything of it is loaded."""

import json
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, EnvironmentProblem

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
UNREAD = {"*.bin": "a pickle can run code", "*.gguf": "a format of other programs"}
UNREAD |= dict.fromkeys(("*.pt", "*.pth", "*.pkl"), UNREAD["*.bin"])
ADAPTERS = "adapter_config.json"
POINTERS = (b"version https://git-lfs.github.com/spec/", b"# xet version")
POINTER_BYTES = 1024  # the pointers' own specification: smaller than this
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_generate")


def check_model_folder(folder: Path | str) -> None:
    """Refuse a folder that lacks files or could run code; all that is missing is named at once.

    Only local files, only safetensors (a pickle can run code when it is read), no model code of the folder's own. What
    stands in the files is for `rlhf_core.models.folders.architecture`.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: a file is not what its name says, or it cannot be told which of the files is meant, or a
            configuration cannot be read, asks for code, or is that of a quantised model.
    """
    folder = Path(folder)
    if folder.is_file():
        raise EnvironmentProblem(f"{folder}: a file and no folder. Fix: a folder written by `save_pretrained`")
    if not folder.is_dir():
        raise EnvironmentProblem(f"{folder}: there is no such folder. Fix: a folder written by `save_pretrained`")
    _refuse_pointers(folder)
    _refuse_adapters(folder)
    missing = _missing(folder)
    if missing:
        raise EnvironmentProblem(
            f"{folder}: missing {'; '.join(missing)}. Fix: where you trust the model, load it and write model and "
            "tokenizer there with `save_pretrained`"
        )
    check_configurations(folder)


def check_configurations(folder: Path) -> None:
    """Refuse a folder whose configurations ask for code or are a quantised model's; its weights need not be there.

    Raises:
        ConfigError: names file, key and cure.
    """
    for name in CONFIGS:
        if (folder / name).is_file():
            _refuse_code(folder / name)
    _refuse_quantised(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order.

    Raises:
        ConfigError: the index of shards cannot be read, names a file elsewhere, or stands beside other weights.
    """
    single, index = (folder / name for name in WEIGHTS)
    if not index.is_file():
        return [single]
    shards = sorted(set(weight_map(index).values()))
    if any(Path(name).name != name for name in shards):
        raise ConfigError(f"{index}: weight_map: names files outside of the folder. Fix: copy or save the model again")
    if single.is_file() and single.name not in shards:
        raise ConfigError(
            f"{folder}: has {single.name} and {index.name}, which names other files: which of them is the model cannot "
            "be told. Fix: remove the one that is not"
        )
    return [folder / name for name in shards]


def weight_map(index: Path) -> dict[str, str]:
    """Which shard holds each tensor, as the index says.

    Raises:
        ConfigError: it does not say so.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ConfigError(f"{index}: no weight_map. Fix: copy or save the model again")
    return found


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
    if (folder / WEIGHTS[1]).is_file() or (folder / WEIGHTS[0]).is_file():
        missing += [path.name for path in weight_files(folder) if not path.is_file()]
    else:
        found = {path.name: why for pattern, why in UNREAD.items() for path in sorted(folder.glob(pattern))}
        unread = f" ({', '.join(found)} is not read: {next(iter(found.values()))})" if found else ""
        missing.append(f"{WEIGHTS[0]}{unread}")
    if not any((folder / name).is_file() for name in TOKENIZER):
        missing.append(TOKENIZER[0])
    return missing


def _refuse_pointers(folder: Path) -> None:
    """Files that stand for others, as a clone without git-lfs has them, and those with nothing in them."""
    sizes = {path: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    named = {path for path in sizes if path.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja")}
    pointers = [path.name for path in named if sizes[path] < POINTER_BYTES and path.read_bytes().startswith(POINTERS)]
    if pointers:
        raise ConfigError(
            f"{folder}: {', '.join(sorted(pointers))}: a pointer of git-lfs and not the file itself. "
            "Fix: `git lfs pull` where the folder was cloned, or copy the files again"
        )
    empty = [path.name for path in named if not sizes[path] and path.name in (*CONFIGS, *TOKENIZER, *WEIGHTS)]
    if empty:
        raise ConfigError(f"{folder}: {', '.join(sorted(empty))}: empty. Fix: copy the files again")


def _refuse_adapters(folder: Path) -> None:
    """Adapters alone, or beside a model: `from_pretrained` would load the base that they name, from elsewhere."""
    if (folder / ADAPTERS).is_file():
        raise ConfigError(
            f"{folder / ADAPTERS}: adapters on another model, which is not read. Fix: merge them "
            "(peft: `merge_and_unload()`) and save the result, or remove this file where the model has them already"
        )


def _refuse_quantised(path: Path) -> None:
    content = read_json(path)
    nested = [part for part in content.values() if isinstance(part, dict)]
    found = [part["quantization_config"] for part in (content, *nested) if part.get("quantization_config")]
    if found:
        method = found[0].get("quant_method") if isinstance(found[0], dict) else None
        raise ConfigError(
            f"{path}: quantization_config: a model quantised by {method or 'some method'}, whose weights cannot be "
            "trained. Fix: the folder of the model before it was quantised, or dequantise it and save it again"
        )


def _refuse_code(path: Path) -> None:
    content = read_json(path)
    found = [key for key in CODE_KEYS if content.get(key)]
    if found:
        raise ConfigError(
            f"{path}: {', '.join(found)}: the folder wants to run code of its own, which is refused. "
            "Fix: use an architecture that transformers itself has"
        )
