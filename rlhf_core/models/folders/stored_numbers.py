"""Whether the numbers in weight files are finite: asked of the files, tensor by tensor, before a model is made of them.

Files are mapped and read once, with no copy: a fifth of a second a gigabyte from memory, else as fast as the disk.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_core.errors import ConfigError
from rlhf_core.models.folders.architecture import AGAIN, first_line, some


def check_stored_numbers(paths: Sequence[Path], parameters: Iterable[str] | None = None) -> None:
    """Refuse weight files with numbers that are NaN or infinite, or would be as 32-bit floats.

    Args:
        paths: safetensors files of one model.
        parameters: the model's; other tensors, such as masks that older programs saved, are not looked at. None looks
            at all.

    Raises:
        ConfigError: names the tensors; or a file is cut or damaged.
    """
    wanted = None if parameters is None else frozenset(parameters)
    ends = frozenset(end for name in wanted or () for end in _ends(name))
    bad: list[str] = []
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if wanted is None or _is_one(name, wanted, ends)]  # noqa: SIM118
                bad += [name for name in names if not _finite(file.get_tensor(name))]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cut or damaged ({first_line(error)}). Fix: copy the file again") from error
    if bad:
        place = paths[0] if len(paths) == 1 else paths[0].parent
        raise ConfigError(f"{place}: {len(bad)} tensors with NaN or infinity: {some(bad)}. {AGAIN}")


def _finite(tensor: Tensor) -> bool:
    """By the smallest and the largest number, which are NaN where one is: no copy of the tensor is made."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).float().isfinite().all())


def _is_one(name: str, parameters: frozenset[str], ends: frozenset[str]) -> bool:
    """Whether a tensor is a parameter, also where one of them has the base model's prefix and the other has not."""
    return name in ends or any(end in parameters for end in _ends(name))


def _ends(name: str) -> list[str]:
    """`a.b.c`, `b.c` and `c` of a dotted name."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
