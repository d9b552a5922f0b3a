"""When a deployment runs by itself: the options of `rlhf deploy`, checked as Prefect's server will read them."""

import difflib
import re
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BaseModel, ConfigDict

from rlhf_core.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from prefect.schedules import Schedule

LEAST_INTERVAL_S, LARGEST_INTERVAL_S = 5, 366 * 24 * 3600
NAME_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CRON_FORM = re.compile(r"\S+(\s+\S+){4}")
DRAWN_FIELD = re.compile(
    r"[RH](\(.*\))?(/\d+)?", re.IGNORECASE
)  # croniter draws these; the server draws anew each time
USUAL_ZONE = "UTC"
OFFSET_FORM = re.compile(r"(?:UTC|GMT)?([+-])(\d{1,2})(?::?(\d\d))?", re.IGNORECASE)


class Timing(BaseModel):
    """When a deployment runs by itself; checked by `read_timing`.

    Attributes:
        cron: five fields.
        interval_s: seconds between runs; at most one of the two is given.
        timezone: IANA name of the zone that the fields of `cron` and days of an interval are counted in.
        paused: whether the schedule is registered but switched off.
    """

    model_config = ConfigDict(frozen=True)

    cron: str | None = None
    interval_s: int | None = None
    timezone: str = USUAL_ZONE
    paused: bool = False

    def __str__(self) -> str:
        zone = "" if self.timezone == USUAL_ZONE else f" {self.timezone}"
        when = (
            f"cron {self.cron}{zone}" if self.cron else f"every {self.interval_s} s" if self.interval_s else "by hand"
        )
        return f"{when}, paused" if self.paused else when


def read_timing(cron: str | None, interval_s: int | None, timezone: str, *, paused: bool) -> Timing:
    """Check the options before any server is there.

    Raises:
        ConfigError: one of them is wrong, or means nothing without another.
        EnvironmentProblem: prefect is not installed as it should be.
    """
    if cron is not None and interval_s is not None:
        raise ConfigError("--cron and --interval: both given. Fix: give one of them")
    if cron is None and interval_s is None:
        lost = "--timezone" if timezone != USUAL_ZONE else "--paused" if paused else None
        if lost:
            raise ConfigError(f"{lost}: there is no schedule that it could be for. Fix: add --cron or --interval")
    if interval_s is not None and not LEAST_INTERVAL_S <= interval_s <= LARGEST_INTERVAL_S:
        problem = "too short" if interval_s < LEAST_INTERVAL_S else "longer than a year"
        raise ConfigError(
            f"--interval {interval_s}: {problem}. Fix: {LEAST_INTERVAL_S} to {LARGEST_INTERVAL_S:,} seconds"
        )
    zone = _zone(timezone)
    if cron is not None:
        _check_cron(cron, zone)
    return Timing(cron=cron, interval_s=interval_s, timezone=zone, paused=paused)


def check_name(name: str) -> str:
    """A deployment's name, which stands in addresses and in `FLOW/NAME`.

    Raises:
        ConfigError: Prefect or a shell would not take it.
    """
    if not NAME_FORM.fullmatch(name):
        raise ConfigError(f"--name {name!r}: not a plain name. Fix: letters, digits, dot, dash, underscore; at most 64")
    return name


def schedule_of(timing: Timing) -> "Schedule | None":
    """The schedule as Prefect takes it; None for none. Imports prefect."""
    from prefect.schedules import Cron, Interval

    if timing.cron is not None:
        return Cron(timing.cron, timezone=timing.timezone, active=not timing.paused)
    if timing.interval_s is not None:
        return Interval(timedelta(seconds=timing.interval_s), timezone=timing.timezone, active=not timing.paused)
    return None


def _zone(name: str) -> str:
    known = available_timezones()
    if name in known:
        return name
    if offset := OFFSET_FORM.fullmatch(name.strip()):  # whose nearest name would be another time
        sign, hours = "-" if offset[1] == "+" else "+", int(offset[2])
        fixed = f"Etc/GMT{sign}{hours}"
        cure = f"{fixed} (its sign is turned round), or a" if fixed in known and not int(offset[3] or 0) else "a"
        raise ConfigError(f"--timezone {name!r}: no such zone. Fix: {cure} name such as Europe/Berlin")
    folded = {zone.casefold(): zone for zone in sorted(known)}
    like = difflib.get_close_matches(name.strip().casefold(), folded, n=1)
    cure = folded[like[0]] if like else "a name such as Europe/Berlin"
    raise ConfigError(f"--timezone {name!r}: no such zone. Fix: {cure}")


def _check_cron(cron: str, zone: str) -> None:
    cure = "Fix: minute, hour, day, month, weekday, e.g. --cron '0 3 * * *', every night at three"
    croniter = _servers_croniter()
    drawn = any(DRAWN_FIELD.fullmatch(field) for field in cron.split())
    if drawn or not CRON_FORM.fullmatch(cron.strip()) or not croniter.is_valid(cron):
        raise ConfigError(f"--cron {cron!r}: not the five fields of a schedule. {cure}")
    try:
        croniter(cron, datetime.now(UTC).astimezone(ZoneInfo(zone))).get_next(datetime)
    except ValueError:  # CroniterBadDateError is one
        raise ConfigError(f"--cron {cron!r}: such a day never comes. {cure}") from None


def _servers_croniter() -> Any:
    """What Prefect's server reads cron fields with.

    Taken from its file, without importing prefect, which must not read its settings before the server's address is
    known, and the server is started when everything else is checked.
    """
    found = find_spec("prefect")
    if found is None or found.origin is None:
        raise EnvironmentProblem("prefect is not installed. Fix: make env")
    file = Path(found.origin).parent / "_vendor/croniter/croniter.py"
    spec = spec_from_file_location("servers_croniter", file)
    if spec is None or spec.loader is None:
        raise EnvironmentProblem(f"{file}: not there. Fix: install the prefect of constraints.txt")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.croniter
