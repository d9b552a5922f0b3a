"""What a model folder's configuration means, and whether its weights are all there: known before they are read.

The names and shapes stand at the head of each safetensors file. transformers' own loader is given them without the
numbers (torch's meta device), so that renamed, tied and obsolete tensors count as they do when the model is loaded.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf_core.errors import ConfigError
from rlhf_core.model_folder import WEIGHTS, check_model_folder, weight_files, weight_map

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE_NUMBERS = {"BOOL": torch.bool, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}  # masks, positions
NAMED_AT_MOST = 8
AGAIN = "Fix: copy the folder again, or save the model again with `save_pretrained`"


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a folder, with every dropout rate set to 0.

    Raises:
        EnvironmentProblem, ConfigError: see `check_model_folder`; also a type that transformers does not know.
    """
    check_model_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"{folder / 'config.json'}: transformers cannot use it ({first_line(error)}). "
            "Fix: an architecture that this version of transformers has"
        ) from error
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{folder / 'config.json'}: is_encoder_decoder: {config.model_type} has an encoder. Fix: a decoder"
        )
    _silence_dropout(config)
    return config


def outline(folder: Path, auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a folder without its numbers (on the meta device), once it is clear that the numbers are all there.

    Args:
        folder: model folder, checked by `check_model_folder`.
        auto_class: `AutoModelForCausalLM` or `AutoModel`.
        config: the folder's.

    Raises:
        ConfigError: a weight file is cut or damaged, a tensor is there under two names, missing, not part of the
            architecture, of another shape or quantised; all such are named (the first few, where they are many).
    """
    tensors = tensor_heads(folder)
    architecture = _class_of(folder, auto_class, config)
    _refuse_two_names(folder, tensors, architecture.base_model_prefix)
    with _quiet():
        try:
            model, info = architecture.from_pretrained(
                None,
                config=config,
                state_dict={name: tensor.clone() for name, tensor in tensors.items()},
                device_map="meta",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise ConfigError(
                f"{folder}: no {architecture.__name__} can be made of it ({first_line(error)}). {AGAIN}"
            ) from error
    problems = {
        "missing": sorted(info["missing_keys"]),
        "not part of it": sorted(info["unexpected_keys"]),
        "of another shape": [
            f"{name} {tuple(given)} instead of {tuple(wanted)}"
            for name, given, wanted in sorted(info["mismatched_keys"])
        ],
        "unreadable": [first_line(error) for error in info["error_msgs"]],
    }
    found = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ConfigError(f"{folder}: tensors of {architecture.__name__}: {'; '.join(found)}. {AGAIN}")
    return model


def _refuse_two_names(folder: Path, names: Collection[str], prefix: str) -> None:
    """One tensor as `model.norm.weight` and as `norm.weight`: transformers would take one of the two in silence."""
    twice = sorted(name for name in names if f"{prefix}.{name}" in names)
    if twice:
        raise ConfigError(f"{folder}: {some(twice)}: there with {prefix}. before the name, too. {AGAIN}")


def tensor_heads(folder: Path) -> dict[str, Tensor]:
    """Type and shape of each tensor of a folder's weight files, as tensors on the meta device.

    Raises:
        ConfigError: a file is cut or damaged, a tensor stands in two files or not in the one that the index names, or
            its numbers are of a type that is none of a trained model.
    """
    found: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    files = weight_files(folder)
    for path in files:
        heads = read_heads(path)
        if twice := sorted(heads.keys() & found.keys()):
            raise ConfigError(f"{path}: {some(twice)}: in {places[twice[0]]} too. {AGAIN}")
        found |= heads
        places |= dict.fromkeys(heads, path.name)
    index = folder / WEIGHTS[1]
    if index.is_file() and (astray := [name for name, file in weight_map(index).items() if places.get(name) != file]):
        raise ConfigError(f"{index}: {some(sorted(astray))}: not in the file that it names. {AGAIN}")
    return found


def read_heads(path: Path) -> dict[str, Tensor]:
    """Type and shape of each tensor of a safetensors file, as tensors on the meta device.

    Raises:
        ConfigError: the file is cut or damaged, or holds quantised numbers.
    """
    heads = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                kind = piece.get_dtype()
                dtype = FLOATS.get(kind) or (None if name.endswith("weight") else WHOLE_NUMBERS.get(kind))
                if dtype is None:
                    raise ConfigError(
                        f"{path}: {name}: numbers of type {kind}: quantised weights, which cannot be trained. "
                        "Fix: the folder of the model before it was quantised"
                    )
                heads[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cut or damaged ({first_line(error)}). Fix: copy the file again") from error
    return heads


def check_numbers(module: nn.Module, folder: Path) -> None:
    """Refuse weights that are not finite numbers.

    Raises:
        ConfigError: names the tensors.
    """
    bad = [name for name, weight in module.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise ConfigError(f"{folder}: {len(bad)} tensors with NaN or infinity: {some(bad)}. {AGAIN}")


def check_same_heads(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of a file whose names or shapes are not the wanted ones.

    Raises:
        ConfigError: names what differs.
    """
    differs = [
        f"{name} {tuple(found[name].shape) if name in found else 'missing'}"
        + (f" instead of {tuple(wanted[name].shape)}" if name in wanted else " is not part of it")
        for name in sorted(found.keys() | wanted.keys())
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape
    ]
    if differs:
        raise ConfigError(f"{path}: {some(differs)}. Fix: copy the folder again")


def _class_of(folder: Path, auto_class: Any, config: PretrainedConfig) -> Any:
    found = auto_class._model_mapping.get(type(config), None)
    if found is None:
        raise ConfigError(
            f"{folder / 'config.json'}: model_type: {config.model_type} is not known as a causal language model. "
            "Fix: a decoder that writes text"
        )
    if not isinstance(found, (list, tuple)):
        return found
    by_name = {one.__name__: one for one in found}
    return next((by_name[name] for name in config.architectures or () if name in by_name), found[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its report of the load: what it would say is in the error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _silence_dropout(config: PretrainedConfig) -> None:
    """Set every dropout rate of a configuration to 0: with it, old and new log-probabilities would never agree."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("_pdrop")):
            setattr(config, key, 0.0)


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def first_line(error: object) -> str:
    """What an error of a library says, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
