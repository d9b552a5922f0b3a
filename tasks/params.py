"""Reading `params.yaml`: the only place in the project that parses configuration.

YAML has traps that silently change a value (a duplicate key wins quietly, `1e-5` is text to some readers), so the
file is read strictly and every complaint names line, key, and cure.
"""

import difflib
import io
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError

from rlhf_core.config import Params
from rlhf_core.config.watched import HOME, PLACEHOLDER, common_folder, holds
from rlhf_core.errors import ConfigError

BARE_EXPONENT = re.compile(r"^\s*[^#'\"]*?:\s*(?P<number>[-+]?\d+[eE][-+]?\d+)\s*(#.*)?$")


def load_params(path: Path) -> Params:
    """Read and check a parameter file.

    Raises:
        ConfigError: one line with file, line, key and cure.
    """
    return check_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> CommentedMap:
    """Read a YAML mapping, keeping comments and line numbers.

    Raises:
        ConfigError: the file is missing, is no mapping, has duplicate keys, aliases or ambiguous numbers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Fix: run from the project's root, or name an existing profile"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}. Fix: save the file as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> CommentedMap:
    """`read_yaml` for text that came from elsewhere; `source` is named in complaints."""
    for number, line in enumerate(text.split("\n"), start=1):
        if match := BARE_EXPONENT.match(line):
            given = match["number"]
            mantissa, exponent = re.split("[eE]", given)
            raise ConfigError(
                f"{source}:{number}: {line.split(':')[0].strip()}: YAML readers disagree whether {given} is a number. "
                f"Fix: write {mantissa}.0e{exponent}"
            )
    try:
        document = YAML(typ="rt").load(io.StringIO(text))
    except DuplicateKeyError as error:
        number = (error.problem_mark or error.context_mark).line + 1
        problem = str(error.problem).split(" with value")[0]
        raise ConfigError(f"{source}:{number}: {problem}. Fix: keep one of the two") from None
    except MarkedYAMLError as error:
        number = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}:{number}: not YAML: {error.problem}. Fix: check indentation and colons") from None
    if document is None:
        return CommentedMap()
    if not isinstance(document, CommentedMap):
        raise ConfigError(f"{source}:1: expected `section:` lines, found {type(document).__name__}")
    return document


def check_params(document: Mapping[str, Any], source: str) -> Params:
    """Validate a parsed document against the schema.

    Raises:
        ConfigError: the first complaint, with the line where the document has one.
    """
    try:
        return Params.model_validate(_plain(document))
    except ValidationError as error:
        raise ConfigError(_explain(error, document, source)) from None


def resolve_params(base: Path, profile: Path | None, overrides: Sequence[str]) -> str:
    """Return the text of a parameter file: `base`, with a profile's keys over it, then `section.key=value` overrides.

    Comments of `base` stay. Where a `models_folder` does not hold the folders that its stage reads, it becomes the
    narrowest one that does: its value follows from the others. The result is checked.

    Raises:
        ConfigError: a file, a profile or an override is wrong.
    """
    document = read_yaml(base)
    if profile is not None:
        overlay = read_yaml(profile)
        if "data" in overlay:  # files of two data sets do not mix
            document["data"] = CommentedMap()
        _merge(document, overlay)
        check_params(_watching(overlay), str(profile))
        check_params(_watching(document), str(profile))
    for override in overrides:
        path, separator, value = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"--set {override}: not of the form section.key=value. Fix: e.g. --set sft.max_steps=100")
        parsed = parse_yaml(f"value: {value}", f"--set {override}")["value"]
        patch: Any = parsed
        for key in reversed(keys):
            patch = CommentedMap({key: patch})
        _merge(document, patch)
        check_params(_watching(document), f"--set {override}")
    text = io.StringIO()
    YAML(typ="rt").dump(_watching(document), text)
    return text.getvalue()


def _watching(document: CommentedMap) -> CommentedMap:
    """The document, or a copy in which each `models_folder` holds the folders that its stage reads."""
    for name, folders_of in (("generate", _generate_folders), ("align", _align_folders)):
        section = document.get(name)
        if isinstance(section, CommentedMap):
            document = _watching_section(document, name, section, folders_of(section))
    return document


def _generate_folders(section: Mapping[str, Any]) -> list[Any]:
    best_of, models = section.get("best_of"), section.get("models")
    folders = list(models) if isinstance(models, list) else []
    return folders + ([best_of["reward_model"]] if isinstance(best_of, Mapping) and best_of.get("reward_model") else [])


def _align_folders(section: Mapping[str, Any]) -> list[Any]:
    """Reward models, and scorers of guards that lie under models/; other scorers are named in `dvc.yaml`."""
    folders, chain = [], section.get("chain")
    for ppo in (section.get("ppo"), chain.get("ppo") if isinstance(chain, Mapping) else None):
        settings = ppo if isinstance(ppo, Mapping) else {}
        guard = settings.get("guard")
        scorer = guard.get("scorer") if isinstance(guard, Mapping) and guard.get("every") else None
        folders += [settings["reward_model"]] if settings.get("reward_model") else []
        folders += [scorer] if isinstance(scorer, str) and scorer.startswith(f"{HOME}/") else []
    return folders


def _watching_section(
    document: CommentedMap, name: str, section: Mapping[str, Any], folders: Sequence[Any]
) -> CommentedMap:
    watched = section.get("models_folder", PLACEHOLDER)
    if not all(isinstance(folder, str) for folder in (watched, *folders)):
        return document  # which the schema refuses
    if folders and all(holds(watched, folder) for folder in folders):
        return document
    changed = deepcopy(document)
    changed[name]["models_folder"] = common_folder(folders)
    return changed


def _merge(target: CommentedMap, patch: Mapping[str, Any]) -> None:
    for key, value in patch.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), CommentedMap):
            _merge(target[key], value)
        else:
            target[key] = value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _explain(error: ValidationError, document: Mapping[str, Any], source: str) -> str:
    first = error.errors(include_url=False)[0]
    location = [part for part in first["loc"] if isinstance(part, str | int)]
    key = ".".join(str(part) for part in location) or "the file"
    line = None if source.startswith("--set") else _line_of(document, location)
    place = source if line is None else f"{source}:{line}"
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        cure = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"{place}: {key}: unknown key. Fix: {cure}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f", not {first['input']!r}"
    return f"{place}: {key}: {message[0].lower()}{message[1:]}{given}. Fix: see docs/parameters.md for what {key} takes"


def _line_of(document: Any, location: Sequence[str | int]) -> int | None:
    line = None
    for part in location:
        if isinstance(document, CommentedMap) and part in (document.lc.data or {}):
            line = document.lc.key(part)[0] + 1
            document = document[part]
        else:
            break
    return line


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Params
    for part in location:
        for name, field in model.model_fields.items():
            if part in (name, field.alias):
                kinds = get_args(field.annotation) or (field.annotation,)  # a section, or a section or null
                model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]
