"""`rlhf models export`, `verify`, `key` and `push`: a version as a folder that other tools read, checked and signed."""

import json as json_format
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flows.root import find_root
from rlhf_core.errors import EnvironmentProblem, GateRefused
from rlhf_core.state.atomic import temporary_folder
from tasks import paths
from tasks.exporting.bundle import Verified, verify_folder
from tasks.exporting.copying import push_to_folder
from tasks.exporting.signing import make_key, signing_key, trusted_keys
from tasks.exporting.subject import FormatName, Numbers


def export(
    version: str,
    folder: Path,
    /,
    *,
    format: FormatName = "hf",
    numbers: Numbers = "float32",
    prompts: Path | None = None,
    key: Path | None = None,
    licence: str | None = None,
    json: bool = False,
) -> int:
    """Write a registered version as a folder that other tools read, held against the version itself.

    A process that knows nothing of this project reads the folder back: log-probabilities (or scores) must be equal
    within 1e-5 and greedy tokens equal on 200 held-out prompts, or nothing is written (exit code 3). With it go a
    model card, a manifest with the SHA-256 of every file and the lineage, and a signature where a key is given.

    Parameters
    ----------
    version:
        name@alias or name/number, such as rlhf-policy@champion.
    folder:
        To be made; one that is there is left as it is where it is this very export, and else refused.
    format:
        hf: a folder of transformers. adapter: LoRA adapters alone, for peft. gguf: one file for llama.cpp and its
        kin. onnx: a graph for onnxruntime.
    numbers:
        What the weights are written in; float16 for gguf only.
    prompts:
        File of rows with `prompt` (for a reward model `response` too) to try it on, in the place of those that the
        run held out.
    key:
        Private key to sign with, by default the file that RLHF_SIGNING_KEY names; see rlhf models key.
    licence:
        Of the exported model, by default that of the pretrained model that it comes from.
    json:
        Print the manifest as JSON.
    """
    said = _export(version, folder, format, numbers=numbers, prompts=prompts, key=key, licence=licence)
    _show(folder, said, json=json)
    return 0


def verify(folder: Path, /, *, trust: list[Path] | None = None, json: bool = False) -> int:
    """Look at every byte of an exported folder and at its signature, offline.

    Exit code 3 where a file is changed, missing or unexpected, where a signature does not hold, and, with keys to
    trust, where the folder is not signed by one of them.

    Parameters
    ----------
    folder:
        Written by rlhf models export, or a copy of it.
    trust:
        Public key file of whom to trust, several by repeating it; also those that RLHF_TRUSTED_KEYS lists. Without
        any, an unsigned or unknown folder that is whole is no error: it is said what that proves.
    json:
        Print what was found as JSON.
    """
    from flows.cli.models import plain

    keys = trusted_keys(trust or [])
    found = verify_folder(folder, keys)
    if json:
        print(json_format.dumps({**plain(found), "proven": found.proven}, indent=2, sort_keys=True))
    else:
        _print_verified(folder, found)
    return 0 if found.is_whole and (not keys or _is_trusted(found)) else GateRefused.exit_code


def key(file: Path, /) -> int:
    """Make a key to sign exports with: FILE, which only you may read, and FILE.pub, which is for everybody.

    Parameters
    ----------
    file:
        To be made, outside of any git checkout.
    """
    fingerprint = make_key(file)
    print(f"{file}  keep it; sign with --key {file} or RLHF_SIGNING_KEY", file=sys.stderr)
    print(f"{file}.pub  give it to whoever checks; rlhf models verify FOLDER --trust {file}.pub", file=sys.stderr)
    print(fingerprint)
    return 0


def push(
    what: str,
    target: str,
    /,
    *,
    public: bool = False,
    update: bool = False,
    prompts: Path | None = None,
    key: Path | None = None,
    licence: str | None = None,
    json: bool = False,
) -> int:
    """Put an exported folder, or a version that is exported first, into a repository of a hub or a folder.

    The folder is verified before. On a hub it becomes one commit, whose files are then held against it by their
    hashes; HF_ENDPOINT and HF_TOKEN say where and by whose right.

    Parameters
    ----------
    what:
        Folder of rlhf models export, or name@alias or name/number, which is exported as hf.
    target:
        hub:ORG/NAME or hub:ORG/NAME@BRANCH, made where it is not there; or a folder to be made.
    public:
        Let everybody read a repository that is made; without, it is private.
    update:
        Let a repository that holds something else get a commit that replaces it.
    prompts:
        For a version; see rlhf models export.
    key:
        For a version; see rlhf models export.
    licence:
        For a version; see rlhf models export.
    json:
        Print where it is as JSON.
    """
    from tasks.exporting.hub import HUB, parse_repository, push_to_hub

    repository = parse_repository(target, public=public, update=update) if target.startswith(HUB) else None
    with ExitStack() as stack:
        folder = Path(what)
        if not folder.is_dir():
            folder = stack.enter_context(temporary_folder(_staging(), "push")) / "export"
            _export(what, folder, "hf", prompts=prompts, key=key, licence=licence)
        found = verify_folder(folder)
        if not found.is_whole:
            raise GateRefused(f"{folder}: not pushed: {'; '.join(found.problems[:3])}. Fix: export it again")
        _tell(f"{found.version}: {found.proven}")
        if repository is None:
            commit, pushed = "", push_to_folder(folder, Path(target))
        else:
            commit, pushed = push_to_hub(folder, repository, f"{found.version} by rlhf models push")
    _tell(f"{target}: {found.version}{f' at commit {commit}' if commit else ''}{'' if pushed else ', there already'}")
    said = {"target": target, "version": found.version, "commit": commit, "pushed": pushed}
    print(json_format.dumps(said, indent=2, sort_keys=True) if json else target)
    return 0


def _export(
    version: str,
    folder: Path,
    format: FormatName,
    *,
    numbers: Numbers = "float32",
    prompts: Path | None,
    key: Path | None,
    licence: str | None,
) -> Mapping[str, Any]:
    from tasks.exporting.export import Wish
    from tasks.exporting.export import export as write

    wish = Wish(format=format, numbers=numbers, prompts=prompts, key=signing_key(key), licence=licence)
    with ExitStack() as stack:
        return write(_subject(version, stack, format), folder, wish, _tell)


def _staging() -> Path:
    return paths.home(find_root(Path.cwd())) / paths.STATE / "staging"


def _subject(version: str, stack: ExitStack, format: FormatName) -> Any:
    """A registered version with its files and its gates, as `params.yaml` has them now."""
    from tasks.exporting.subject import GateFound, Subject
    from tasks.params import load_params
    from tasks.tracking import download_version, read_manifest, standing_of
    from tasks.tracking.names import SCORING_MODEL

    root = find_root(Path.cwd())
    home = paths.home(root)
    named, manifest = read_manifest(home, version)
    standing = standing_of(home, str(named), load_params(root / paths.PARAMS))
    scratch = stack.enter_context(temporary_folder(_staging(), "export"))
    return Subject(
        reference=str(named),
        kind="reward" if named.name == SCORING_MODEL else "policy",
        stage=named.stage,
        content=named.outputs_hash,
        folder=download_version(home, named, "artifacts/model", scratch),
        home=home,
        manifest=manifest,
        metrics=named.metrics,
        base=_base(home, named, manifest, scratch) if format == "adapter" else None,
        gates=tuple(GateFound(passed=gate.passed, text=str(gate)) for gate in standing.gates),
    )


def _base(home: Path, named: Any, manifest: Mapping[str, Any], scratch: Path) -> tuple[str, Path] | None:
    """The version that an aligned policy's adapters were trained on: SFT of its run; None for what SFT itself was."""
    from tasks.tracking import download_version, list_versions
    from tasks.tracking.compare import model_hash
    from tasks.tracking.names import SFT_MODEL

    if named.name == SFT_MODEL:
        return None
    wanted = model_hash(manifest, "sft")
    for version in list_versions(home, SFT_MODEL):
        if version.outputs_hash == wanted:
            return str(version), download_version(home, version, "artifacts/model", scratch / "base")
    raise EnvironmentProblem(f"{named}: the SFT version that its adapters were trained on is gone. Fix: --format hf")


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _show(folder: Path, said: Any, *, json: bool) -> None:
    from tasks.exporting.parity import Parity

    _tell(f"{said['version']} as {said['format']}: {Parity(**said['parity'])}")
    found = verify_folder(folder)
    _tell(f"signed by {found.signature.key}" if found.signature else found.proven)
    print(json_format.dumps(said, indent=2, sort_keys=True) if json else folder)


def _is_trusted(found: Verified) -> bool:
    return found.signature is not None and found.signature.holds and found.signature.trusted


def _print_verified(folder: Path, found: Verified) -> None:
    for problem in found.problems:
        print(problem)
    for name in found.beside:
        print(f"{name}: no part of it")
    whole = f"{found.files} files, every byte as listed" if found.is_whole else f"{len(found.problems)} problems"
    print(f"{folder}: {found.version}: {whole}; {found.proven}")
