"""API keys: from the environment or a file, never from the command line, which every user of the machine can read."""

import hmac
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_core.errors import ConfigError, EnvironmentProblem

VARIABLE = "RLHF_API_KEY"
LEAST_LENGTH = 16


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys that open a server: of a file one a line, blank lines and `#` lines left out, else the environment's.

    Raises:
        EnvironmentProblem: the file cannot be read.
        ConfigError: it holds no key, or one that is too short or holds what no header can carry.
    """
    if file is None:
        found = [environment[VARIABLE].strip()] if environment.get(VARIABLE, "").strip() else []
        where = VARIABLE
    else:
        found, where = _lines(file), str(file)
        if not found:
            raise ConfigError(f"{file}: no key. Fix: one a line, such as `openssl rand -hex 32` writes")
    for number, key in enumerate(found, start=1):
        if len(key) < LEAST_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"{where}: key {number}: not at least {LEAST_LENGTH} letters of ASCII without blanks. "
                "Fix: openssl rand -hex 32"
            )
    return tuple(found)


def key_number(given: str, keys: Sequence[str]) -> int | None:
    """Which of the keys is given; takes as long whichever it is, and for any other of its length."""
    found = None
    for number, key in enumerate(keys):
        if hmac.compare_digest(given.encode(), key.encode()):
            found = number
    return found


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentProblem(f"{file}: cannot be read ({error}). Fix: a file with one key a line") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
