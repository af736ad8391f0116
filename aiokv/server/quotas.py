"""What one account may use: requests a second, bytes and entries."""

import itertools
import math
from collections.abc import Callable, Sequence

from aiokv import clock as process_clock
from aiokv.backends.base import Backend, HostedBackend, ImmediateBackend, Usage, WouldWaitError
from aiokv.errors import CallError, CorruptValueError
from aiokv.record import Record

_NOTHING = Usage(0, 0)
_ABSENT = -1
# A caller that waited exactly as long as it was told finds a whole token, whatever the rounding.
_ROUNDING = 1e-9


class AccountLimits(Record):
    """The limits of one account; None is no limit.

    Args:
        requests_per_second: Requests a second, above 0; fractions count.
        max_stored_bytes: Bytes of UTF-8 values, those of expired entries too until they are swept.
        max_stored_entries: Entries, expired ones too until they are swept.

    Raises:
        ValueError: A number is out of its range.
    """

    requests_per_second: float | None = None
    max_stored_bytes: int | None = None
    max_stored_entries: int | None = None

    def __post_init__(self) -> None:
        rate = self.requests_per_second
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"requests_per_second must be a number above 0, or None for no limit, not {rate!r}")
        for name in ("max_stored_bytes", "max_stored_entries"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise ValueError(f"{name} must be 0 or more, or None for no limit, not {number!r}")


class _Set:
    """A set that is under way; of a claim without a name."""

    __slots__ = ("name", "old_bytes", "value_bytes")

    def __init__(self, name: tuple[str, str] | None, value_bytes: int) -> None:
        self.name = name
        self.value_bytes = value_bytes
        self.old_bytes: int | None = None
        """Bytes of the entry that it replaces, `_ABSENT` where there is none; None while nobody has looked."""


class Quotas:
    """The limits of all accounts, applied by one process; every worker process grants its own requests a second.

    Requests draw on a token bucket: it gains `requests_per_second` tokens a second and holds one second's worth, at least one.
    A request that is refused takes nothing. A new limit holds from the next request on.

    Args:
        limits_of: Returns the present limits of an account; called for each request.
        clock: Returns monotonic seconds; None takes `aiokv.clock.monotonic`, looked up at each use.
        backend: The store of the values; one that cannot count what an account stores has no quotas of bytes and entries.
        of_all: Whether there is one account, whose quota is for all namespaces, those with a `:` too.
    """

    def __init__(
        self,
        limits_of: Callable[[str], AccountLimits],
        clock: Callable[[], float] | None = None,
        *,
        backend: Backend | None = None,
        of_all: bool = False,
    ) -> None:
        self._limits_of = limits_of
        self._hosted: HostedBackend | None = backend if isinstance(backend, HostedBackend) else None
        self._get_now: Callable[[str, str], str | None] | None = (
            backend.get_now if isinstance(backend, ImmediateBackend) else None
        )
        self._of_all = of_all
        self._clock = clock
        # The tokens of each account, and the time at which they were counted.
        self._buckets: dict[str, tuple[float, float]] = {}
        self._sets: dict[str, dict[int, _Set]] = {}
        self._under_way: dict[str, Usage] = {}
        self._numbers = itertools.count(1)

    def admit(self, account: str) -> float:
        """Take one request from an account's bucket.

        Args:
            account: The account.

        Returns:
            0.0 where the request may go on, else the seconds after which the bucket holds a token again.
        """
        rate = self._limits_of(account).requests_per_second
        if rate is None:
            return 0.0
        now = process_clock.monotonic() if self._clock is None else self._clock()
        burst = max(1.0, rate)
        tokens, counted_at = self._buckets.get(account, (burst, now))
        if now > counted_at:
            tokens += (now - counted_at) * rate
        tokens = min(tokens, burst)
        if tokens < 1.0 - _ROUNDING:
            return (1.0 - tokens) / rate
        self._buckets[account] = (tokens - 1.0, now)
        return 0.0

    def charge(self, account: str, count: int) -> None:
        """Take what a request that was let in costs beyond one; the account's bucket may go below empty by it.

        Args:
            account: The account.
            count: Tokens.
        """
        bucket = self._buckets.get(account)
        if bucket is not None:
            self._buckets[account] = (bucket[0] - count, bucket[1])

    def check_claim(self, account: str) -> str | None:
        """Check a claim, which counts as an entry while it lasts, against what its account stores.

        An account at its quota of entries can still claim, up to 16 entries and an eighth of the quota beyond it. What this
        returns is not for renewals: whoever holds a claim must be able to keep it.

        Args:
            account: The account.

        Returns:
            As `refuse_set`.
        """
        most = self._limits_of(account).max_stored_entries
        if most is None or self._hosted is None:
            return None
        used = self._usage(self._hosted, account).entries + self.under_way(account).entries
        if used < most + 16 + most // 8:
            return None
        return f"the quota max-entries is {most:,}, and {used:,} are stored, with no room for claims either; delete entries"

    def has_quota(self, account: str) -> bool:
        """Return whether there is a bound of what an account may store."""
        return self._hosted is not None and self._has_quota(account)

    def give_back(self, account: str) -> None:
        """Put back what `admit` took, for a request that is admitted once more."""
        if account in self._buckets:
            tokens, counted_at = self._buckets[account]
            self._buckets[account] = (tokens + 1.0, counted_at)

    def under_way(self, account: str) -> Usage:
        """Return what the sets of an account that are under way will store."""
        return self._under_way.get(account, _NOTHING)

    def check_set(self, account: str, db_name: str, key: str, value_bytes: int) -> str | None:
        """Check a set against what its account stores, and against its other sets that are under way.

        Args:
            account: The account.
            db_name: The namespace, the account included.
            key: The key.
            value_bytes: Bytes of the value.

        Returns:
            As `refuse_set`.
        """
        if self._hosted is None or not self._has_quota(account):
            return None
        usage, under_way = self._usage(self._hosted, account), self.under_way(account)
        reason = self.refuse_set(account, usage, under_way.value_bytes, value_bytes, under_way.entries)
        if reason is None or self._get_now is None:
            return reason
        growth, sizes = self._growth(account)
        old_bytes = self._old_bytes((db_name, key), value_bytes, sizes)
        return self.refuse_set(account, usage, growth.value_bytes, value_bytes, growth.entries, _replaced(old_bytes))

    def begin_batch(
        self, account: str, db_name: str, entries: Sequence[tuple[str, int]]
    ) -> tuple[dict[int, str], Sequence[int | None]]:
        """Check the sets of a batch, which apply in their order, and count those that may go on as under way.

        What one of them replaces makes room for those behind it.

        Args:
            account: The account.
            db_name: The namespace, the account included.
            entries: Key and bytes of each set.

        Returns:
            Why sets are refused, by their index, as `refuse_set`; and what `end_set` gets for each of the others.
        """
        reasons: dict[int, str] = {}
        if self._hosted is None or not self._has_quota(account):
            return reasons, ()
        usage, under_way = self._usage(self._hosted, account), self.under_way(account)
        all_bytes = sum(value_bytes for _, value_bytes in entries)
        # As if the largest number of entries came with the last byte of all of them.
        reserved = Usage(under_way.value_bytes, under_way.entries + len(entries) - 1)
        if self._get_now is None or self.refuse_set(account, usage, reserved.value_bytes, all_bytes, reserved.entries) is None:
            return self._begin_each(account, db_name, entries)
        growth, sizes = self._growth(account)
        grown_bytes, grown_entries = growth.value_bytes, growth.entries
        own: dict[str, int] = {}
        for index, (key, value_bytes) in enumerate(entries):
            old_bytes = own.get(key)
            if old_bytes is None:
                old_bytes = self._old_bytes((db_name, key), value_bytes, sizes)
            reason = self.refuse_set(account, usage, grown_bytes, value_bytes, grown_entries, _replaced(old_bytes))
            if reason is not None:
                reasons[index] = reason
                continue
            grown_bytes += value_bytes - max(0, old_bytes)
            grown_entries += old_bytes == _ABSENT
            own[key] = value_bytes
        taken = [entry for index, entry in enumerate(entries) if index not in reasons]
        return reasons, [self.begin_set(account, value_bytes, (db_name, key)) for key, value_bytes in taken]

    def _begin_each(
        self, account: str, db_name: str, entries: Sequence[tuple[str, int]]
    ) -> tuple[dict[int, str], Sequence[int | None]]:
        reasons: dict[int, str] = {}
        numbers = []
        for index, (key, value_bytes) in enumerate(entries):
            reason = self.check_set(account, db_name, key, value_bytes)
            if reason is None:
                numbers.append(self.begin_set(account, value_bytes, (db_name, key)))
            else:
                reasons[index] = reason
        return reasons, numbers

    def begin_set(self, account: str, value_bytes: int, name: tuple[str, str] | None = None) -> int | None:
        """Count a set as under way, until `end_set`.

        Args:
            account: The account.
            value_bytes: Bytes of the set's value.
            name: Namespace and key, by which it is known what the set replaces; None for what is no value.

        Returns:
            A number for `end_set`, or None where the account has no quota and nothing is counted.
        """
        if not self._has_quota(account):
            return None
        number = next(self._numbers)
        self._sets.setdefault(account, {})[number] = _Set(name, value_bytes)
        others = self.under_way(account)
        self._under_way[account] = Usage(others.value_bytes + value_bytes, others.entries + 1)
        return number

    def end_set(self, account: str, number: int) -> None:
        """Count a set as under way no more.

        Args:
            account: The account.
            number: What `begin_set` returned.
        """
        sets = self._sets[account]
        value_bytes = sets.pop(number).value_bytes
        if sets:
            all_ = self._under_way[account]
            self._under_way[account] = Usage(all_.value_bytes - value_bytes, all_.entries - 1)
        else:
            del self._sets[account], self._under_way[account]

    def _growth(self, account: str) -> tuple[Usage, dict[tuple[str, str], int]]:
        """Return by how much the sets under way can make an account grow, and the largest value on its way to each entry.

        One that replaces an entry by a smaller one may still fail, and so makes no room before it is stored.
        """
        value_bytes = entries = 0
        sizes: dict[tuple[str, str], int] = {}
        for each in self._sets.get(account, {}).values():
            if each.name is None:
                entries += 1
                continue
            old_bytes = sizes.get(each.name)
            if old_bytes is None:
                if each.old_bytes is None:
                    each.old_bytes = self._old_bytes(each.name, each.value_bytes, {})
                old_bytes = each.old_bytes
            entries += old_bytes == _ABSENT
            value_bytes += max(0, each.value_bytes - max(0, old_bytes))
            sizes[each.name] = max(old_bytes, each.value_bytes)
        return Usage(value_bytes, entries), sizes

    def _old_bytes(self, name: tuple[str, str], value_bytes: int, sizes: dict[tuple[str, str], int]) -> int:
        """Return the bytes of the entry that a set replaces; `_ABSENT` where there is none, or it cannot be read now."""
        if name in sizes:
            return sizes[name]
        if self._get_now is None:
            return _ABSENT
        try:
            old = self._get_now(*name)
        except CorruptValueError:
            # How large it was is not known; it must be possible to set it anew.
            return value_bytes
        except (WouldWaitError, CallError):
            return _ABSENT
        return _ABSENT if old is None else len(old.encode())

    def refuse_set(  # noqa: PLR0913, PLR0917 (each is one number of the sum)
        self,
        account: str,
        usage: Usage,
        reserved_bytes: int,
        value_bytes: int,
        reserved_entries: int = 0,
        replaced: Usage = _NOTHING,
    ) -> str | None:
        """Check whether a set would take an account past what it may store.

        A set counts in full: what it replaces is not known without a read. After a refusal the caller may read the old entry
        and ask again with `replaced`. Then a value that is no larger than the old one is always accepted, so that an account at
        its quota, or past a quota that was lowered, can still replace its entries by smaller ones. Deletes are never refused.

        Args:
            account: The account.
            usage: What the account stores.
            reserved_bytes: Bytes of the account's other sets that are under way.
            value_bytes: Bytes of this set's value.
            reserved_entries: The number of the account's other sets that are under way.
            replaced: The size of the entry that this set replaces, where it is known: its bytes, and 1.

        Returns:
            None where the set may go on, else the quota that it would exceed, for the answer with status 507.
        """
        limits = self._limits_of(account)
        owner = f" of account {account}" if account else ""
        max_bytes = limits.max_stored_bytes
        if max_bytes is not None and value_bytes > replaced.value_bytes:
            used = usage.value_bytes + reserved_bytes
            if used - replaced.value_bytes + value_bytes > max_bytes:
                return (
                    f"the quota max-bytes{owner} is {max_bytes:,} bytes: {used:,} are stored or on their way, and this value "
                    f"has {value_bytes:,}; delete entries, wait until some expire, or have the quota raised"
                )
        max_entries = limits.max_stored_entries
        if max_entries is not None and not replaced.entries:
            used = usage.entries + reserved_entries
            if used >= max_entries:
                return (
                    f"the quota max-entries{owner} is {max_entries:,}, and {used:,} are stored or on their way; "
                    "delete entries, wait until some expire, or have the quota raised"
                )
        return None

    def _usage(self, hosted: HostedBackend, account: str) -> Usage:
        if not self._of_all:
            return hosted.usage(account)
        gauges = hosted.gauges()
        return Usage(gauges.value_bytes, gauges.entries)

    def _has_quota(self, account: str) -> bool:
        limits = self._limits_of(account)
        return limits.max_stored_bytes is not None or limits.max_stored_entries is not None


def _replaced(old_bytes: int) -> Usage:
    return _NOTHING if old_bytes == _ABSENT else Usage(old_bytes, 1)
