"""What `rlhf models fetch` is asked for, read from one word."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_core.errors import ConfigError

Kind = Literal["hub", "gguf", "folder", "version"]
FORMS = "hub:ORG/NAME@REVISION, a .gguf file, a folder, or a registered version such as rlhf-policy@champion"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[\w./-]+")
_VERSION = re.compile(r"[\w.-]+(@[\w.-]+|/\d+)")
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        kind: what `name` names.
        name: repository, path, or reference of a registered version.
        revision: branch, tag or commit of a repository.
    """

    kind: Kind
    name: str
    revision: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "hub":
                return f"hub:{self.name}@{self.revision}"
            case "gguf" | "folder":
                return Path(self.name).name  # where it lay on this machine is nobody else's business
        return self.name


def parse_source(text: str) -> Source:
    """Read the first word of `rlhf models fetch`.

    Raises:
        ConfigError: it is of none of the forms, or names a file or folder that is not there.
    """
    if text.startswith("hub:"):
        name, _, revision = text.removeprefix("hub:").partition("@")
        if not _REPOSITORY.fullmatch(name) or not _REVISION.fullmatch(revision or "main"):
            raise ConfigError(f"{text}: not of the form hub:ORG/NAME@REVISION. Fix: such as hub:org/model@main")
        return Source(kind="hub", name=name, revision=revision or "main")
    path = Path(text).expanduser()
    if path.is_dir():
        return Source(kind="folder", name=str(path))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{text}: there is no such file. Fix: the path of a .gguf file")
        return Source(kind="gguf", name=str(path))
    if path.exists() or not _VERSION.fullmatch(text):
        raise ConfigError(f"{text}: none of {FORMS}. Fix: one of them")
    return Source(kind="version", name=text)


def check_name(name: str) -> str:
    """The folder's name below models/.

    Raises:
        ConfigError: it is no plain name, or one that is taken for models from numbers.
    """
    if not _NAME.fullmatch(name) or name == "none":
        raise ConfigError(f"{name}: no name of a folder under models/. Fix: letters, digits, '.', '_' and '-'")
    return name
