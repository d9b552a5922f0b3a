"""`rlhf chat`."""

import getpass
import re
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

from flows.cli.serve import Device, chosen_device
from flows.cli.versions import model_folder
from flows.root import find_root
from rlhf_core.errors import ConfigError
from tasks import paths

if TYPE_CHECKING:
    from flows.chat.speaker import Manner
    from rlhf_core.serving.served import ServedPolicy


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How answers are written.

    Parameters
    ----------
    system:
        The system's turn, before the first question.
    temperature:
        Of sampling; 0 takes the likeliest token each time.
    top_p:
        Draw from the fewest likeliest tokens whose probabilities reach this.
    max_tokens:
        Longest answer.
    seed:
        The same seed and questions give the same answers and order; left out, it is drawn, and kept with votes.
    device:
        Where the models run: auto is a GPU where torch sees one.
    """

    system: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    device: Device = "auto"


class _Console:
    """The terminal, or a pipe."""

    def ask(self, question: str) -> str:
        """See `Terminal`; a pipe is asked nothing."""
        return input(question if sys.stdin.isatty() else "")

    def show(self, text: str) -> None:
        """See `Terminal`."""
        print(text, end="", flush=True)


def chat(
    version: str,
    /,
    *,
    against: str | None = None,
    votes: Path | None = None,
    annotator: str | None = None,
    options: ChatOptions = ChatOptions(),
) -> int:
    """Talk with a version in the terminal; with --against, compare two blind and keep the votes as data.

    With --against both answer each question, in an order by chance; which version is which is shown at the end alone.
    Votes are appended at once to a file that `rlhf run --data votes=FILE` takes.

    Parameters
    ----------
    version:
        A registered version such as rlhf-policy@candidate, or a folder.
    against:
        The other version.
    votes:
        File for the votes, JSONL; left out, votes/ANNOTATOR.jsonl, which git ignores.
    annotator:
        Who votes; left out, the name of the user of this machine.
    """
    manner = _manner(options)
    if against is None:
        if votes is not None or annotator is not None:
            raise ConfigError("chat: --votes and --annotator need --against VERSION")
        return _talk(version, options, manner)
    name = _annotator(annotator)
    file = votes if votes is not None else _home() / "votes" / f"{name}.jsonl"
    if file.suffix != ".jsonl":
        raise ConfigError(f"--votes {file}: rows are appended as JSONL. Fix: a name that ends with .jsonl")
    return _compare(version, against, file, name, options, manner)


def _talk(version: str, options: ChatOptions, manner: "Manner") -> int:
    from flows.chat.talk import talk

    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited, and earlier ones called back
    policy = _loaded(version, options)
    try:
        talk(policy, _Console(), manner, options.system)
    finally:
        policy.close()
    return 0


def _compare(one: str, other: str, file: Path, annotator: str, options: ChatOptions, manner: "Manner") -> int:
    from flows.chat.talk import BlindSession, compare_blind

    policies = _loaded(one, options), _loaded(other, options)
    if policies[0].name == policies[1].name:
        raise ConfigError(f"--against {other}: both are {policies[0].name}. Fix: two versions, or two folders")
    session = BlindSession(policies=policies, annotator=annotator, file=file)
    try:
        compare_blind(session, _Console(), manner, options.system)
    finally:
        for policy in policies:
            policy.close()
    return 0


def _loaded(reference: str, options: ChatOptions) -> "ServedPolicy":
    from rlhf_core.serving.served import Room, ServedPolicy, serve_folder

    with model_folder(reference) as found:
        print(f"loading {found.name}", file=sys.stderr)
        served = serve_folder(found.name, found.folder, chosen_device(options.device), Room(rows=1))
    if isinstance(served, ServedPolicy):
        return served
    served.close()
    raise ConfigError(f"{reference}: a reward model scores and does not talk. Fix: a policy; rlhf serve has /score")


def _manner(options: ChatOptions) -> "Manner":
    from flows.chat.speaker import Manner
    from rlhf_core.rollout.token_draw import CutOff

    if not 0 <= options.temperature <= 2:
        raise ConfigError(f"--temperature {options.temperature}: from 0 to 2")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p {options.top_p}: above 0, at most 1")
    if options.max_tokens < 1:
        raise ConfigError(f"--max-tokens {options.max_tokens}: at least 1")
    seed = secrets.randbits(31) if options.seed is None else options.seed
    cut_off = CutOff(top_p=options.top_p)
    return Manner(temperature=options.temperature, cut_off=cut_off, max_tokens=options.max_tokens, seed=seed)


def _annotator(given: str | None) -> str:
    """Who votes, as the name of a file too."""
    name = given if given is not None else getpass.getuser()
    if not re.fullmatch(r"[\w.@-]{1,64}", name) or name.startswith("."):
        raise ConfigError(f"--annotator {name}: letters, digits and . _ - @ alone, at most 64")
    return name


def _home() -> Path:
    """The checkout that somebody stands in, or else the folder: one may compare folders anywhere."""
    try:
        return paths.home(find_root(Path.cwd()))
    except ConfigError:
        return Path.cwd()
