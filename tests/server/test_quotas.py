"""What an account may use: requests a second by a token bucket, bytes and entries by quotas."""

import pytest
from helpers import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from aiokv.backends.base import Usage
from aiokv.backends.memory import MemoryBackend
from aiokv.server.quotas import AccountLimits, Quotas

MAX_BYTES = 1_000
MAX_ENTRIES = 10


def quotas_of(limits: AccountLimits, clock: FakeClock | None = None) -> Quotas:
    return Quotas(lambda _account: limits, clock)


RATES = st.floats(0.01, 5_000, allow_nan=False)


@given(rate=RATES, gaps=st.lists(st.one_of(st.just(0.0), st.floats(0, 0.01), st.floats(0, 30)), min_size=1, max_size=120))
def test_no_window_has_more_requests_than_the_rate_and_one_burst(rate: float, gaps: list[float]) -> None:
    clock = FakeClock(0.0)
    quotas = quotas_of(AccountLimits(rate), clock)
    granted: list[float] = []
    for gap in gaps:
        clock.advance(gap)
        granted += [clock.now for _ in range(4) if quotas.admit("alice") == 0.0]
    burst = max(1.0, rate)
    for first, start in enumerate(granted):
        for last in range(first, len(granted)):
            assert last - first + 1 <= rate * (granted[last] - start) + burst + 1e-6


@given(rate=RATES, tries=st.integers(1, 50), start=st.floats(0, 100_000))
def test_request_is_admitted_after_the_wait_that_was_named_and_not_before(rate: float, tries: int, start: float) -> None:
    clock = FakeClock(start)
    quotas = quotas_of(AccountLimits(rate), clock)
    while (wait := quotas.admit("alice")) == 0.0:
        pass
    assert 0.0 < wait <= 1.0 / rate * 1.001
    for _ in range(tries):
        # A request that is refused takes nothing.
        assert quotas.admit("alice") == wait
    clock.advance(wait * 0.9)
    assert quotas.admit("alice") > 0.0
    clock.advance(wait * 0.1001)
    assert quotas.admit("alice") == 0.0


@pytest.mark.parametrize("rate", [0.3, 1.0, 3.0, 7.1, 49.0, 999.9])
def test_request_that_waited_exactly_as_long_as_it_was_told_is_admitted(rate: float) -> None:
    clock = FakeClock(0.0)
    quotas = quotas_of(AccountLimits(rate), clock)
    for _ in range(3_000):
        wait = quotas.admit("alice")
        clock.now = clock.now + wait
        assert wait == 0.0 or quotas.admit("alice") == 0.0


@pytest.mark.parametrize(("rate", "burst"), [(100.0, 100), (2.5, 2), (1.0, 1), (0.25, 1)])
def test_burst_is_one_seconds_worth_and_at_least_one(clock: FakeClock, rate: float, burst: int) -> None:
    quotas = quotas_of(AccountLimits(rate), clock)
    for _ in range(2):
        assert [quotas.admit("alice") == 0.0 for _ in range(burst + 1)] == [True] * burst + [False]
        # However long the pause: no more than one burst is saved up.
        clock.advance(1_000_000)


def test_full_rate_is_granted_second_by_second(clock: FakeClock) -> None:
    quotas = quotas_of(AccountLimits(10.0), clock)
    admitted = 0
    for _ in range(1_000):
        admitted += quotas.admit("alice") == 0.0
        clock.advance(0.01)
    assert 109 <= admitted <= 110


def test_accounts_have_buckets_of_their_own(clock: FakeClock) -> None:
    quotas = quotas_of(AccountLimits(1.0), clock)
    assert [quotas.admit(account) == 0.0 for account in ("alice", "alice", "bob", "bob", "")] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_changed_rate_holds_from_the_next_request_on(clock: FakeClock) -> None:
    limits = AccountLimits(0.01)
    quotas = Quotas(lambda _account: limits, clock)
    assert quotas.admit("alice") == 0.0
    assert quotas.admit("alice") == pytest.approx(100)
    limits = AccountLimits(10.0)
    assert quotas.admit("alice") == pytest.approx(0.1)
    limits = AccountLimits(None)
    assert quotas.admit("alice") == 0.0
    limits = AccountLimits(1_000.0)
    clock.advance(60)
    assert quotas.admit("alice") == 0.0
    limits = AccountLimits(1.0)
    assert [quotas.admit("alice") == 0.0 for _ in range(2)] == [True, False]


def test_clock_of_the_package_is_taken_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    quotas = quotas_of(AccountLimits(1.0))
    monkeypatch.setattr("aiokv.clock.monotonic", lambda: 50.0)
    assert [quotas.admit("alice") == 0.0 for _ in range(2)] == [True, False]
    monkeypatch.setattr("aiokv.clock.monotonic", lambda: 51.0)
    assert quotas.admit("alice") == 0.0


def test_account_without_limits_is_never_refused(clock: FakeClock) -> None:
    quotas = quotas_of(AccountLimits(), clock)
    assert all(quotas.admit("alice") == 0.0 for _ in range(1_000))
    assert quotas.refuse_set("alice", Usage(10**18, 10**18), 10**18, 10**6) is None


@pytest.mark.parametrize(
    ("stored", "reserved", "value", "is_refused"),
    [
        *((0, 0, 1_000, False), (0, 0, 1_001, True), (900, 0, 100, False), (900, 0, 101, True), (900, 50, 50, False)),
        *((900, 51, 50, True), (1_000, 0, 0, False), (1_000, 0, 1, True), (2_000, 0, 1, True), (0, 1_000, 1, True)),
    ],
)
def test_set_is_refused_where_it_would_pass_the_quota_of_bytes(
    stored: int, reserved: int, value: int, *, is_refused: bool
) -> None:
    reason = quotas_of(AccountLimits(None, MAX_BYTES)).refuse_set("alice", Usage(stored, 1), reserved, value)
    assert (reason is not None) == is_refused
    if reason is not None:
        assert "max-bytes" in reason
        assert "alice" in reason
        assert "1,000" in reason


@pytest.mark.parametrize(
    ("stored", "reserved", "is_refused"), [(9, 0, False), (10, 0, True), (8, 1, False), (8, 2, True), (11, 0, True)]
)
def test_set_is_refused_where_it_would_pass_the_quota_of_entries(stored: int, reserved: int, *, is_refused: bool) -> None:
    quotas = quotas_of(AccountLimits(None, None, MAX_ENTRIES))
    reason = quotas.refuse_set("alice", Usage(1, stored), 0, 1, reserved)
    assert (reason is not None) == is_refused
    if reason is not None:
        assert "max-entries" in reason


def test_quota_of_zero_stores_nothing() -> None:
    assert quotas_of(AccountLimits(None, 0)).refuse_set("", Usage(0, 0), 0, 1) is not None
    assert quotas_of(AccountLimits(None, None, 0)).refuse_set("", Usage(0, 0), 0, 0) is not None


def test_reason_for_the_only_account_names_no_account() -> None:
    reason = quotas_of(AccountLimits(None, MAX_BYTES)).refuse_set("", Usage(0, 0), 0, 1_001)
    assert reason is not None
    assert "account" not in reason


@pytest.mark.parametrize(
    ("old_bytes", "value_bytes", "is_refused"), [(100, 100, False), (100, 99, False), (100, 101, True), (0, 1, True)]
)
@pytest.mark.parametrize("stored", [MAX_BYTES, 5 * MAX_BYTES])
def test_known_replacement_at_the_quota_may_not_grow(
    stored: int, old_bytes: int, value_bytes: int, *, is_refused: bool
) -> None:
    quotas = quotas_of(AccountLimits(None, MAX_BYTES, MAX_ENTRIES))
    usage = Usage(stored, MAX_ENTRIES)
    assert quotas.refuse_set("alice", usage, 0, value_bytes) is not None
    reason = quotas.refuse_set("alice", usage, 0, value_bytes, replaced=Usage(old_bytes, 1))
    assert (reason is not None) == is_refused


def test_known_replacement_below_the_quota_may_grow_up_to_it() -> None:
    quotas = quotas_of(AccountLimits(None, MAX_BYTES))
    assert quotas.refuse_set("alice", Usage(900, 1), 0, 300, replaced=Usage(200, 1)) is None
    assert quotas.refuse_set("alice", Usage(900, 1), 1, 300, replaced=Usage(200, 1)) is not None


@given(
    sets=st.lists(st.tuples(st.integers(0, 400), st.sampled_from("abcd")), max_size=60),
    limit=st.integers(0, 1_000),
    entries=st.integers(0, 4),
)
def test_account_whose_sets_are_asked_about_never_passes_its_quotas(
    sets: list[tuple[int, str]], limit: int, entries: int
) -> None:
    quotas = quotas_of(AccountLimits(None, limit, entries))
    stored: dict[str, int] = {}
    for value_bytes, name in sets:
        usage = Usage(sum(stored.values()), len(stored))
        replaced = Usage(stored[name], 1) if name in stored else Usage(0, 0)
        if quotas.refuse_set("alice", usage, 0, value_bytes, replaced=replaced) is None:
            stored[name] = value_bytes
        assert sum(stored.values()) <= limit
        assert len(stored) <= entries


@pytest.mark.parametrize(
    "limits",
    [
        *({"requests_per_second": rate} for rate in (0, -1.0, float("nan"), float("inf"))),
        *({"max_stored_bytes": -1}, {"max_stored_entries": -1}),
    ],
)
def test_limit_out_of_its_range_is_named(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        AccountLimits(**limits)  # type: ignore[arg-type]  # wrong on purpose


async def quotas_over(
    stored: dict[str, str], *, max_bytes: int | None = None, max_entries: int | None = None
) -> tuple[Quotas, MemoryBackend]:
    backend = MemoryBackend()
    for key, value in stored.items():
        await backend.set("db", key, value, 60)
    return Quotas(lambda _: AccountLimits(None, max_bytes, max_entries), backend=backend, of_all=True), backend


async def test_overwrite_on_its_way_is_no_new_entry() -> None:
    quotas, _ = await quotas_over({f"k{index}": "v" for index in range(9)}, max_entries=10)
    number = quotas.begin_set("", 1, ("db", "k1"))
    assert quotas.check_set("", "db", "new", 1) is None
    quotas.begin_set("", 1, ("db", "new"))
    # The same new entry twice is one; another one has no room.
    assert quotas.check_set("", "db", "new", 1) is None
    assert quotas.check_set("", "db", "other", 1) is not None
    assert number is not None
    quotas.end_set("", number)
    assert quotas.check_set("", "db", "other", 1) is not None


async def test_overwrite_on_its_way_counts_the_bytes_that_it_adds() -> None:
    quotas, _ = await quotas_over({"big": "v" * 900}, max_bytes=1_000)
    quotas.begin_set("", 950, ("db", "big"))
    assert quotas.check_set("", "db", "new", 50) is None
    assert quotas.check_set("", "db", "new", 51) is not None
    # It may fail, so what a smaller value frees counts only once that is stored.
    quotas.begin_set("", 1, ("db", "big"))
    assert quotas.check_set("", "db", "new", 51) is not None
    assert quotas.check_set("", "db", "big", 951) is None


@pytest.mark.parametrize(
    ("entries", "refused"),
    [
        ([("k1", 1), ("new", 1)], []),
        ([("new", 1), ("k1", 1)], []),
        ([("new", 1), ("new", 2), ("other", 1), ("k1", 1)], [2]),
        ([("k0", 1), ("k1", 1), ("k2", 1), ("new", 1), ("other", 1)], [4]),
    ],
)
async def test_batch_may_overwrite_and_fill_the_last_room_for_entries(
    entries: list[tuple[str, int]], refused: list[int]
) -> None:
    quotas, _ = await quotas_over({f"k{index}": "v" for index in range(9)}, max_entries=10)
    reasons, numbers = quotas.begin_batch("", "db", entries)
    assert list(reasons) == refused
    assert len(numbers) == len(entries) - len(refused)


@pytest.mark.parametrize(
    ("entries", "refused"),
    [
        ([("big", 1), ("new", 500)], []),
        ([("new", 500), ("big", 1)], [0]),
        ([("big", 950), ("new", 50)], []),
        ([("big", 950), ("new", 51)], [1]),
        ([("new", 100), ("new", 1), ("other", 99)], []),
    ],
)
async def test_batch_counts_the_bytes_of_its_sets_in_their_order(entries: list[tuple[str, int]], refused: list[int]) -> None:
    quotas, _ = await quotas_over({"big": "v" * 900}, max_bytes=1_000)
    assert list(quotas.begin_batch("", "db", entries)[0]) == refused


@given(
    before=st.dictionaries(st.sampled_from("abcde"), st.integers(0, 300)),
    entries=st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(0, 300)), max_size=12),
    limit=st.integers(0, 1_000),
    most=st.integers(0, 6),
)
async def test_batch_is_refused_what_its_sets_alone_in_their_order_would_be(
    before: dict[str, int], entries: list[tuple[str, int]], limit: int, most: int
) -> None:
    stored = {key: "v" * size for key, size in before.items()}
    together, _ = await quotas_over(stored, max_bytes=limit, max_entries=most)
    alone, backend = await quotas_over(stored, max_bytes=limit, max_entries=most)
    refused = []
    for index, (key, size) in enumerate(entries):
        if alone.check_set("", "db", key, size) is None:
            await backend.set("db", key, "v" * size, 60)
        else:
            refused.append(index)
    reasons, numbers = together.begin_batch("", "db", entries)
    assert list(reasons) == refused
    for number in numbers:
        assert number is not None
        together.end_set("", number)
    assert together.under_way("") == (0, 0)
