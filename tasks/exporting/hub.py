"""An exported folder in a repository of a hub that speaks Hugging Face's protocol: one commit, and then looked at.

`HF_ENDPOINT` and `HF_TOKEN` mean what they mean to `huggingface_hub`. Large files go by its Xet protocol to the hub of
Hugging Face, by plain LFS to any other.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.state.atomic import tree_digest
from tasks.exporting.bundle import BESIDE

HUB = "hub:"
OWN_FILES = (".gitattributes",)  # of every repository of a hub
_TARGET = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
CONFLICT, FORBIDDEN = 409, (401, 403)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """Where a folder goes.

    Attributes:
        name: ORG/NAME.
        branch: of it.
        public: whether everybody may read it, where it is made anew.
        update: whether one that holds something else gets a commit that replaces it.
    """

    name: str
    branch: str = "main"
    public: bool = False
    update: bool = False

    def __str__(self) -> str:
        return f"{HUB}{self.name}@{self.branch}"


def parse_repository(text: str, *, public: bool, update: bool) -> Repository:
    """Read `hub:ORG/NAME[@branch]`.

    Raises:
        ConfigError: it is not of that form.
    """
    found = _TARGET.fullmatch(text.removeprefix(HUB))
    if found is None:
        raise ConfigError(f"{text}: not of the form hub:ORG/NAME@BRANCH. Fix: such as hub:org/model")
    return Repository(name=found[1], branch=found[2] or "main", public=public, update=update)


def push_to_hub(folder: Path, repository: Repository, message: str) -> tuple[str, bool]:
    """Put a folder into a repository; returns the commit, and whether there was anything to do.

    Args:
        folder: that was verified.
        repository: made where it is not there, private unless it is to be public.
        message: of the commit.

    Raises:
        ConfigError: there is something else, or the token may not write there.
        EnvironmentProblem: the hub does not answer, or holds other bytes afterwards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    if constants.ENDPOINT.rstrip("/") != "https://huggingface.co":
        constants.HF_HUB_DISABLE_XET = True  # read at each upload; with hf_xet installed nothing else would be tried
    api, wanted = HfApi(), _wanted(folder)
    with _answering(repository):
        _make(api, repository)
        there = _listed(api, repository)
        if not _differing(folder, wanted, there):
            return api.model_info(repository.name, revision=repository.branch).sha or "", False
        if there and not repository.update:
            raise ConfigError(
                f"{repository}: is there already and holds other files ({', '.join(sorted(there)[:3])}). "
                "Fix: --update to replace them by a commit, or another name or branch"
            )
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in wanted]
        gone = [CommitOperationDelete(path_in_repo=name) for name in sorted(there.keys() - wanted.keys())]
        head = api.model_info(repository.name, revision=repository.branch).sha
        made = api.create_commit(
            repository.name, [*added, *gone], commit_message=message, revision=repository.branch, parent_commit=head
        )
        left = _differing(folder, wanted, _listed(api, repository))
    if left:
        raise EnvironmentProblem(f"{repository}: the hub holds other bytes of {', '.join(left[:3])}. Fix: push again")
    return made.oid, True


def _wanted(folder: Path) -> dict[str, str]:
    """SHA-256 of what is pushed, by name; what a fetch or another client left in the folder is not."""
    folders = tuple(name for name in BESIDE if name.endswith("/"))
    found = tree_digest(folder)
    return {name: found[name] for name in found if not name.startswith(folders) and name not in BESIDE}


def _make(api: Any, repository: Repository) -> None:
    from huggingface_hub import errors

    try:
        api.create_repo(repository.name, private=not repository.public)
    except errors.HfHubHTTPError as error:
        if error.response.status_code != CONFLICT:
            raise
    if repository.branch != "main":
        api.create_branch(repository.name, branch=repository.branch, exist_ok=True)


def _listed(api: Any, repository: Repository) -> dict[str, Any]:
    """Files of a branch by name."""
    tree = api.list_repo_tree(repository.name, revision=repository.branch, recursive=True)
    return {file.path: file for file in tree if hasattr(file, "blob_id") and file.path not in OWN_FILES}


def _differing(folder: Path, wanted: dict[str, str], there: dict[str, Any]) -> list[str]:
    """Names of files that the hub lacks, has too many, or holds other bytes of, by the hashes that it tells."""
    found = []
    for name in sorted({*wanted, *there}):
        if name not in wanted or name not in there:
            found.append(name)
        elif there[name].lfs is not None:
            found += [name] if there[name].lfs.sha256 != wanted[name] else []
        elif there[name].blob_id != _blob_name(folder / name):
            found.append(name)
    return found


def _blob_name(path: Path) -> str:
    """How git names a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _answering(repository: Repository) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into one line."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in FORBIDDEN:
            raise ConfigError(
                f"{repository}: this token may not write there, or there is none. Fix: HF_TOKEN with a token that may "
                "write to it"
            ) from error
        raise EnvironmentProblem(f"{repository}: {_first_line(error)}. Fix: look at HF_ENDPOINT, push again") from error
    except (httpx2.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise EnvironmentProblem(
            f"{repository}: {_first_line(error)}. Fix: look at the network, HF_ENDPOINT and HF_HUB_OFFLINE, push again"
        ) from error
    except ValueError as error:  # a card or an answer that the client refuses
        raise EnvironmentProblem(f"{repository}: {_first_line(error)}. Fix: see the line; push again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
