"""Models from a hub that speaks Hugging Face's protocol: one commit of a repository, what of it is read, and no code.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to `huggingface_hub`, whose cache the
files go through: a download that was broken off goes on where it ended, and what is cached needs no network.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.model_folder import WEIGHTS, check_configurations
from tasks.fetching.blobs import LARGE, bring_large
from tasks.fetching.install import copy_files
from tasks.fetching.source import Source
from tasks.lineage.provenance import UNKNOWN

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before huggingface_hub is imported and reads it

WANTED = (
    "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*", "README.md", "reward_head*",
    "*.safetensors", "model.safetensors.index.json", "rlhf_manifest.*",
)  # fmt: skip
_GLOB = str.maketrans({"[": "[[]", "*": "[*]", "?": "[?]"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """One commit of a repository.

    Attributes:
        source: what was asked for.
        commit: what its revision stands for now.
        licence: as the repository's card names it.
        files: bytes of every file that is read.
        left_out: names of those that are not, such as pickles, code and folders within.
    """

    source: Source
    commit: str
    licence: str
    files: Mapping[str, int]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of what is read."""
        return sum(self.files.values())


def list_repository(source: Source) -> Listing:
    """Ask the hub for a commit, its files and its licence; without a network, the cache.

    Raises:
        ConfigError: there is no such repository or revision, it may not be read, or it holds no safetensors.
        EnvironmentProblem: the hub does not answer, and the commit is not whole in the cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return _cached(source)
    with answering(source):
        revision = HfApi().resolve_revision(source.name, revision=source.revision)
        info = HfApi().model_info(source.name, revision=revision.resolved, files_metadata=True)
    sizes = {entry.rfilename: int(entry.size or 0) for entry in info.siblings or ()}
    licence = info.card_data.get("license") if info.card_data else None
    return _listing(source, revision.resolved, str(licence or UNKNOWN), sizes)


def download(listing: Listing, folder: Path) -> None:
    """Bring the files of a listing into `folder`: first those that say what the model is, then its weights.

    Raises:
        ConfigError: the configuration asks for code, or the model is quantised: nothing of its weights is fetched then.
        EnvironmentProblem: the hub does not answer any more; asked again, it goes on where it ended.
    """
    small = [name for name in listing.files if not name.endswith(".safetensors")]
    _fetch(listing, small, folder)
    check_configurations(folder)
    _fetch(listing, [name for name in listing.files if name not in small], folder)


def _fetch(listing: Listing, names: list[str], folder: Path) -> None:
    """Through the cache of `huggingface_hub`; then a copy of one's own, since a cache may go."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    with answering(listing.source):
        for name in names if not HF_HUB_OFFLINE else ():
            if listing.files[name] > LARGE:
                bring_large(listing.source.name, listing.commit, name)
        cached = snapshot_download(
            listing.source.name,
            revision=listing.commit,
            allow_patterns=[name.translate(_GLOB) for name in names],
            local_files_only=HF_HUB_OFFLINE,
        )
    copy_files(Path(cached), folder, names)


def _cached(source: Source) -> Listing:
    """What the cache knows of a repository, as it was when something of it was last downloaded."""
    from huggingface_hub import HfApi, ModelCard, get_cached_repo_tree, try_to_load_from_cache

    with answering(source):
        revision = HfApi().resolve_revision(source.name, revision=source.revision, local_files_only=True)
        sizes = {file.path: file.size for file in get_cached_repo_tree(source.name, revision=revision)}
    card = try_to_load_from_cache(source.name, "README.md", revision=revision.resolved)
    licence = ModelCard.load(card).data.get("license") if isinstance(card, str) else None
    return _listing(source, revision.resolved, str(licence or UNKNOWN), sizes)


def _listing(source: Source, commit: str, licence: str, sizes: Mapping[str, int]) -> Listing:
    read = {name: size for name, size in sorted(sizes.items()) if _is_read(name)}
    left_out = tuple(sorted(sizes.keys() - read.keys()))
    if "config.json" not in read:
        raise ConfigError(f"{source}: no config.json: no model of transformers. Fix: another repository or revision")
    if not any(name in read for name in WEIGHTS):
        pickles = [name for name in left_out if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
        other = f" (it has {', '.join(pickles[:3])}, which is not read)" if pickles else ""
        raise ConfigError(
            f"{source}: no {WEIGHTS[0]}{other}. Fix: a revision or repository of the model in safetensors"
        )
    return Listing(source=source, commit=commit, licence=licence, files=read, left_out=left_out)


def _is_read(name: str) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in WANTED)


@contextmanager
def answering(source: Source) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into one line.

    Raises:
        ConfigError: there is no such repository or revision, or it may not be read.
        EnvironmentProblem: the hub does not answer.
    """
    import httpx2
    from huggingface_hub import errors

    again = "Fix: look at the network, HF_ENDPOINT and HF_HUB_OFFLINE, then fetch again: it goes on where it ended"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{source}: gated: its owner grants access. Fix: ask on its page, then HF_TOKEN with that account's token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"{source}: there is no revision {source.revision}. Fix: a branch, tag or commit of it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{source}: no such repository, or a private one. Fix: its name, or HF_TOKEN with a token that may read it"
        ) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.CachedRepoTreeNotFoundError,
        errors.RevisionResolutionError,
    ) as error:
        raise EnvironmentProblem(
            f"{source}: the hub is not asked or does not answer, and the cache does not hold it. {again}"
        ) from error
    except (errors.HfHubHTTPError, httpx2.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise EnvironmentProblem(f"{source}: {_first_line(error)}. {again}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
