"""The forms that a version is exported in, an entry each: how it is written, how near what is read back must come."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.exporting.form import Source, WrittenForm
from tasks.exporting.hf import write_hf
from tasks.exporting.parity import TOLERANCE
from tasks.exporting.subject import FormatName, Kind, Numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A form.

    Attributes:
        docs: one line for help and documentation.
        kinds: of versions that have it.
        write: into a folder that is there and empty.
        tolerance: largest difference of log-probabilities between the version and what is read back.
        numbers: what its weights may be written in, the default first.
    """

    docs: str
    kinds: tuple[Kind, ...]
    write: Callable[[Source, Path], WrittenForm]
    tolerance: float = TOLERANCE
    numbers: tuple[Numbers, ...] = ("float32",)


FORMATS: Mapping[FormatName, Format] = {
    "hf": Format(docs="a folder of transformers, safetensors", kinds=("policy",), write=write_hf),
}
