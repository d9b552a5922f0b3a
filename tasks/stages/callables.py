"""Functions of a person's own that `params.yaml` names as `package.module:function`: found, checked, called.

A function gives one finite number a response. It names as parameters what it wants of

    prompts        list of texts
    responses      list of texts
    prompt_ids     list of lists of tokens, as the model reads them
    response_ids   list of lists of tokens, the end token included
    finished       list of booleans, whether each response ended by itself

and is called with these by keyword, all lists of the same length. It is imported once, from the project's root or from
what is installed, and tried on an empty response before training begins.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_core.config.watched import HOME
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.state.atomic import file_digest
from rlhf_core.text.tokenizer import decode_response
from rlhf_core.trainers.ppo.replay import Written
from rlhf_core.trainers.ppo.terms import Rate, checked_rates
from tasks.frame.stage import Stage

ARGUMENTS = ("prompts", "responses", "prompt_ids", "response_ids", "finished")


def load_rate(
    stage: Stage,
    key: str,
    name: str,
    prompts: Sequence[tuple[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
) -> Rate:
    """The function as something that rates responses to `prompts`.

    Args:
        stage: whose inputs must cover the function's file, so that DVC sees when it changes.
        key: where `params.yaml` names it, for messages.
        name: `package.module:function`.
        prompts: text and tokens; `Written.prompt` is a place among them.
        tokenizer: makes texts of responses.

    Raises:
        ConfigError: it cannot be imported, is no function, wants other arguments, or its file is no input of the stage.
        DataError: tried on an empty response, it failed or gave no finite number.
    """
    place = f"params.yaml: {key}: {name}"
    function = _imported(stage.root, name, place)
    wanted = _wanted(function, place)
    _note_file(stage, function, place)

    def rate(rows: Sequence[Written]) -> list[float]:
        everything: dict[str, list[Any]] = {
            "prompts": [prompts[row.prompt][0] for row in rows],
            "responses": [decode_response(tokenizer, row.response_ids) for row in rows],
            "prompt_ids": [prompts[row.prompt][1] for row in rows],
            "response_ids": [row.response_ids for row in rows],
            "finished": [row.finished for row in rows],
        }
        try:
            given = function(**{argument: everything[argument] for argument in wanted})
        except Exception as error:
            raise DataError(f"{place}: {type(error).__name__}: {error}. Fix: correct the function") from error
        return checked_rates(place, given, len(rows))

    rate([Written(prompt=0, response_ids=[int(tokenizer.eos_token_id)], finished=True)])
    return rate


def _imported(root: Path, name: str, place: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever a person's module does when it is imported
        raise ConfigError(
            f"{place}: cannot be imported ({type(error).__name__}: {error}). "
            "Fix: package.module:function, found from the project's root"
        ) from error
    if not callable(function):
        raise ConfigError(f"{place}: is a {type(function).__name__}, no function. Fix: name a function")
    return function


def _wanted(function: Callable[..., Any], place: str) -> list[str]:
    """The arguments that a function names; one that takes any keyword gets them all."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(ARGUMENTS)
    wanted = [parameter.name for parameter in parameters if parameter.name in ARGUMENTS]
    unknown = [p.name for p in parameters if p.default is p.empty and p.name not in ARGUMENTS]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if unknown or positional or not wanted:
        raise ConfigError(
            f"{place}: takes {', '.join(unknown or positional) or 'none of the arguments'}. "
            f"Fix: parameters named {', '.join(ARGUMENTS)}, or some of them"
        )
    return wanted


def _note_file(stage: Stage, function: Callable[..., Any], place: str) -> None:
    """Make the function's file part of what the stage's result depends on."""
    source = inspect.getsourcefile(inspect.unwrap(function))
    if source is None:
        raise ConfigError(f"{place}: has no source file. Fix: a function written in Python")
    path = Path(source).resolve()
    if not path.is_relative_to(stage.root.resolve()):
        stage.depends_on(place, file_digest(path))
        return
    relative = path.relative_to(stage.root.resolve())
    check_is_input(stage, relative, place)


def check_is_input(stage: Stage, path: Path, place: str) -> None:
    """Refuse a file or folder of the project that `dvc.yaml` does not name among the stage's inputs.

    Raises:
        ConfigError: it does not.
    """
    if not any(path.is_relative_to(dep) for dep in stage.definition.deps):
        kind = stage.name.partition("@")[0]
        watched = f"{kind}.models_folder: {path.as_posix()}, or " if path.parts[0] == HOME else ""
        raise ConfigError(
            f"{place}: {path} is no input of stage {stage.name}, so nothing would run again when it changes. "
            f"Fix: {watched}add it to deps of stage {kind} in dvc.yaml"
        )
