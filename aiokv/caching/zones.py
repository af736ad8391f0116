"""Time zones and frequencies of tables and timestamps, by their names, and back. Pure."""

import datetime as dt
import importlib
import sys
import zoneinfo
from typing import Any, TypeGuard

from aiokv.caching.unpackable import Unpackable


def describe_zone(zone: Any) -> list[Any]:
    """Describe a time zone by its name, or by its offset.

    Args:
        zone: A `tzinfo`.

    Raises:
        Unpackable: It has no name that leads to it.
    """
    if zone is dt.UTC:
        return ["utc"]
    if type(zone) is dt.timezone:
        return ["offset", zone.utcoffset(None).total_seconds(), zone.tzname(None)]
    if type(zone) is zoneinfo.ZoneInfo and zone.key:
        try:
            # Zones that were read from a file, whose key is only a label, cannot be pickled.
            zone.__reduce__()
        except Exception:  # noqa: BLE001 (PicklingError, whose module is large)
            raise Unpackable("has a time zone that was read from a file", "take zoneinfo.ZoneInfo(name)") from None
        return ["zoneinfo", zone.key]
    if _is_pytz(zone) and zone.zone:
        return ["pytz", zone.zone]
    raise Unpackable(f"has a time zone of type {type(zone).__qualname__}", "take zoneinfo.ZoneInfo(name)")


def restore_zone(described: Any) -> Any:
    """Make the time zone that was described.

    Args:
        described: What `describe_zone` returned, or anything else.

    Raises:
        ValueError: It is none.
    """
    kind, *content = described
    if kind == "utc":
        return dt.UTC
    if kind == "offset":
        zone = dt.timezone(dt.timedelta(seconds=content[0]))
        return zone if zone.tzname(None) == content[1] else dt.timezone(dt.timedelta(seconds=content[0]), content[1])
    if kind == "zoneinfo":
        return zoneinfo.ZoneInfo(content[0])
    if kind == "pytz":
        # Of pandas 2, which needs it.
        return importlib.import_module("pytz").timezone(content[0])
    raise ValueError("the stored time zone is of an unknown kind")


def describe_frequency(offset: Any) -> str:
    """Describe the frequency of an index by its text.

    Args:
        offset: A `pandas.offsets.BaseOffset`.

    Raises:
        Unpackable: The text does not lead back to it, such as that of business days with holidays.
    """
    text: str = offset.freqstr
    try:
        back = sys.modules["pandas"].tseries.frequencies.to_offset(text)
    except ValueError:
        back = None
    if back is None or _state_of(back) != _state_of(offset):
        raise Unpackable("has a frequency that its freqstr does not say in full", "set the freq of that index to None")
    return text


def describe_period(dtype: Any, text: str) -> str:
    """Describe the frequency of periods by its text.

    Args:
        dtype: A `pandas.PeriodDtype`.
        text: The text.

    Raises:
        Unpackable: The text does not lead back to it.
    """
    if _state_of(type(dtype)(text).freq) != _state_of(dtype.freq):
        raise Unpackable("has periods of a frequency that its text does not say in full", "convert them with asfreq")
    return text


def _state_of(offset: Any) -> tuple[object, ...]:
    """Return all that distinguishes a frequency; its `==` leaves out the calendar."""
    parameters = dict(offset.kwds)
    calendar = parameters.pop("calendar", None)
    days = None if calendar is None else (calendar.weekmask.tobytes(), calendar.holidays.tobytes())
    return offset, type(offset), offset.n, offset.normalize, parameters, days


def _is_pytz(zone: Any) -> TypeGuard[Any]:
    return type(zone).__module__.partition(".")[0] == "pytz"
