"""Large files of a hub, byte by byte: a download that was killed goes on where it ended, in another process too.

`huggingface_hub` (2.x) begins a file anew when its process is gone, since a file that several processes share could be
spoilt where locks do not hold; it asks for the rest of one within a process only. So the large files are put into its
cache before it looks: at their place there, under their hash, once that hash is right.
"""

import hashlib
from pathlib import Path

from filelock import FileLock

from rlhf_core.errors import EnvironmentProblem

LARGE = 10 * 2**20
"""Bytes that the client writes at a time: of smaller files there is never a part."""

_SHA256 = 64  # hex digits of large files' names; others are named as git names them


def bring_large(repository: str, commit: str, name: str) -> None:
    """Download one file into the cache of `huggingface_hub`, going on with what an earlier process left of it.

    Raises:
        EnvironmentProblem: what came is not what the hub says it is; it is thrown away.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository, name, revision=commit)
    about = get_hf_file_metadata(url)
    if about.etag is None or about.size is None or not LARGE < about.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    blob, part = folder / about.etag, folder / f"{about.etag}.part"
    if blob.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):
        with part.open("ab") as file:
            http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=about.size)
        if _digest(part, about.etag) != about.etag:
            part.unlink()
            raise EnvironmentProblem(
                f"hub:{repository}@{commit[:12]}: {name}: not the bytes that the hub names. Fix: fetch again"
            )
        part.replace(blob)


def _digest(path: Path, name: str) -> str:
    """The hash that a blob is named by: SHA-256, or that of git with its head."""
    digest = hashlib.sha256() if len(name) == _SHA256 else hashlib.sha1(usedforsecurity=False)
    if len(name) != _SHA256:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
