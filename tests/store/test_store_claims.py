"""Claims of a store: held by one at a time, renewed while a block runs, released behind it."""

import asyncio
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import clean_environment

from aiokv import AsyncKVStore, Event, StorageError, UnsupportedError
from aiokv.backends.capabilities import ClaimOutcome
from aiokv.backends.memory import MemoryBackend


class ClaimingBackend(MemoryBackend):
    """Note calls for claims; hold or fail them where a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        # What happens behind the next claim in the store, before its answer arrives.
        self.answer_gate: asyncio.Event | None = None

    async def _pass(self, verb: str) -> None:
        self.calls.append(verb)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        await self._pass("claim")
        outcome = await super().claim(db_name, key, owner, seconds)
        if self.answer_gate is not None:
            await self.answer_gate.wait()
        return outcome

    async def renew(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        await self._pass("renew")
        outcome = await super().renew(db_name, key, owner, seconds)
        if self.answer_gate is not None:
            await self.answer_gate.wait()
        return outcome

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        await self._pass("release")
        return await super().release(db_name, key, owner)


@pytest.fixture
def backend() -> ClaimingBackend:
    return ClaimingBackend()


@pytest.fixture
def store(backend: ClaimingBackend) -> AsyncKVStore:
    return AsyncKVStore("db", backend=backend)


async def test_one_holds_a_claim_at_a_time_and_the_next_one_behind_it(able: AsyncKVStore) -> None:
    async with able.claim("k") as first:
        assert first.is_held
        assert 10 < first.seconds_left <= 15
        async with able.claim("k") as second, able.claim("other") as other:
            assert (second.is_held, other.is_held) == (False, True)
            assert 10 < second.seconds_left <= 15.1
        async with able.claim("k") as third:
            assert not third.is_held
        assert first.is_held
    assert not first.is_held
    async with able.claim("k") as fourth:
        assert fourth.is_held


async def test_of_fifty_that_come_at_once_one_holds_it(able: AsyncKVStore) -> None:
    held = 0

    async def work() -> None:
        nonlocal held
        async with able.claim("k") as claim:
            held += claim.is_held
            await everybody.wait()

    everybody = asyncio.Barrier(50)
    await asyncio.gather(*(work() for _ in range(50)))
    assert held == 1


async def test_claim_stores_nothing_under_its_key(able: AsyncKVStore) -> None:
    async with able.claim("k"):
        assert (await able.get("k"), await able.count()) == (None, 0)
        await able.set("k", "v")
    assert await able.get("k") == "v"


async def test_claim_is_released_though_its_block_fails(able: AsyncKVStore) -> None:
    with pytest.raises(LookupError):
        async with able.claim("k"):
            raise LookupError
    async with able.claim("k") as claim:
        assert claim.is_held


async def test_claim_is_released_though_its_block_is_cancelled(able: AsyncKVStore) -> None:
    began = asyncio.Event()

    async def work() -> None:
        async with able.claim("k"):
            began.set()
            await asyncio.Event().wait()

    working = asyncio.create_task(work())
    await began.wait()
    working.cancel()
    await asyncio.wait([working])
    async with able.claim("k") as claim:
        assert claim.is_held


@pytest.mark.slow
async def test_claim_is_renewed_while_its_block_runs(able: AsyncKVStore) -> None:
    async with able.claim("k", 1) as claim:
        for _ in range(12):
            await asyncio.sleep(0.2)
            async with able.claim("k", 1) as other:
                assert (claim.is_held, other.is_held) == (True, False)


@pytest.mark.slow
async def test_claim_that_cannot_be_renewed_is_not_held_any_more_and_never_again(
    store: AsyncKVStore, backend: ClaimingBackend
) -> None:
    async with store.claim("k", 1) as claim:
        backend.error = StorageError("away")
        while claim.is_held:
            await asyncio.sleep(0.02)
        backend.error = None
        # It is free by now, and another could have had it.
        await asyncio.sleep(0.5)
        assert not claim.is_held
        async with store.claim("k", 1) as other:
            assert other.is_held


async def test_claim_whose_time_is_over_is_not_held_though_nobody_has_said_so(store: AsyncKVStore, kv_clock: Any) -> None:
    async with store.claim("k", 15) as claim:
        kv_clock.advance(14.5)
        assert (claim.is_held, 0 < claim.seconds_left <= 0.5) == (True, True)
        kv_clock.advance(0.5)
        assert (claim.is_held, claim.seconds_left) == (False, 0.0)
        async with store.claim("k", 15) as other:
            assert other.is_held


async def test_claim_counts_from_before_its_request(store: AsyncKVStore, backend: ClaimingBackend, kv_clock: Any) -> None:
    backend.answer_gate = asyncio.Event()
    entering = asyncio.create_task(store.claim("k", 15).__aenter__())
    await asyncio.sleep(0)
    kv_clock.advance(15)
    backend.answer_gate.set()
    claim = await entering
    assert not claim.is_held
    await claim.__aexit__()


async def test_renewal_that_is_answered_behind_the_end_of_the_claim_does_not_bring_it_back(
    store: AsyncKVStore, backend: ClaimingBackend, kv_clock: Any
) -> None:
    async with store.claim("k", 3) as claim:
        backend.answer_gate = asyncio.Event()
        async with asyncio.timeout(10):
            while len(backend.calls) < 2:
                await asyncio.sleep(0.01)
        # Renewed after 1 second, it would last until 4 have gone by; but before 3 nobody knew.
        kv_clock.advance(2.5)
        backend.answer_gate.set()
        await asyncio.sleep(0.05)
        assert not claim.is_held


@pytest.mark.slow
async def test_claim_is_not_renewed_once_its_store_is_closed(url: str) -> None:
    store = AsyncKVStore("db", url=url)
    async with store.claim("k", 1) as claim:
        assert claim.is_held
        await store.aclose()
        async with AsyncKVStore("db", url=url) as other, asyncio.timeout(10):
            while True:
                async with other.claim("k", 1) as next_claim:
                    if next_claim.is_held:
                        break
                await asyncio.sleep(0.05)
        assert not claim.is_held


async def test_claim_that_is_granted_while_its_store_closes_is_not_renewed(
    store: AsyncKVStore, backend: ClaimingBackend
) -> None:
    backend.answer_gate = asyncio.Event()
    entering = asyncio.create_task(store.claim("k", 1).__aenter__())
    await asyncio.sleep(0)
    await store.aclose()
    backend.answer_gate.set()
    claim = await entering
    assert claim.is_held
    await asyncio.sleep(0.5)
    assert backend.calls == ["claim"]
    await claim.__aexit__()


async def test_claims_of_other_stores_are_renewed_though_one_store_is_closed(backend: ClaimingBackend) -> None:
    store, other = (AsyncKVStore("db", backend=backend) for _ in range(2))
    async with store.claim("k", 1) as claim, asyncio.timeout(10):
        await other.aclose()
        while "renew" not in backend.calls:
            await asyncio.sleep(0.02)
        assert claim.is_held


async def test_renewal_that_arrives_behind_the_release_takes_nothing(store: AsyncKVStore, backend: ClaimingBackend) -> None:
    renewals: list[tuple[str, str, str, float]] = []

    async def hold_back(db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        renewals.append((db_name, key, owner, seconds))
        return await asyncio.Event().wait()  # type: ignore[return-value]

    backend.renew = hold_back  # type: ignore[method-assign]
    async with store.claim("k", 1), asyncio.timeout(10):
        while not renewals:
            await asyncio.sleep(0.02)
    # The network delivers it now.
    assert not (await MemoryBackend.renew(backend, *renewals[0])).is_held
    async with store.claim("k") as claim:
        assert claim.is_held


async def test_error_of_the_store_is_raised_before_the_block(store: AsyncKVStore, backend: ClaimingBackend) -> None:
    backend.error = StorageError("broken", maybe_applied=True)
    with pytest.raises(StorageError):
        await store.claim("k").__aenter__()
    await asyncio.sleep(0)
    # It may be held all the same.
    assert backend.calls == ["claim", "release"]


async def test_error_that_took_nothing_is_followed_by_nothing(store: AsyncKVStore, backend: ClaimingBackend) -> None:
    backend.error = StorageError("broken")
    with pytest.raises(StorageError):
        await store.claim("k").__aenter__()
    await asyncio.sleep(0)
    assert backend.calls == ["claim"]


async def test_claim_that_was_taken_behind_the_back_of_who_gave_up_is_given_back(
    store: AsyncKVStore, backend: ClaimingBackend
) -> None:
    backend.answer_gate = asyncio.Event()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(store.claim("k").__aenter__(), 0.01)
    backend.answer_gate.set()
    async with store.claim("k") as claim:
        assert claim.is_held


async def test_release_that_fails_disturbs_nobody(store: AsyncKVStore, backend: ClaimingBackend) -> None:
    async with store.claim("k") as claim:
        backend.error = StorageError("broken")
    assert not claim.is_held


@pytest.mark.slow
async def test_release_that_hangs_is_given_up(store: AsyncKVStore, backend: ClaimingBackend) -> None:
    async with asyncio.timeout(10), store.claim("k"):
        backend.gate = asyncio.Event()


async def test_claim_is_entered_once(store: AsyncKVStore) -> None:
    claim = store.claim("k")
    async with claim:
        with pytest.raises(RuntimeError, match="make another one with"):
            await claim.__aenter__()
        assert claim.is_held


async def test_claim_ends_with_its_store(able: AsyncKVStore) -> None:
    async with able.claim("k") as claim:
        await able.aclose()
    assert not claim.is_held


@pytest.mark.parametrize(
    ("seconds", "kind", "words"),
    [
        (0.99, ValueError, "seconds must be from 1 to 3,600, not 0.99"),
        (3_600.5, ValueError, "seconds must be from 1 to 3,600, not 3,600.5"),
        (float("nan"), ValueError, "not nan"),
        (10**400, ValueError, "not a longer number"),
        (-(10**400), ValueError, "not a longer number"),
        (timedelta(hours=2), ValueError, "not 7,200"),
        (True, TypeError, "seconds must be a number or a timedelta, not bool"),
        ("15", TypeError, "not str"),
        (None, TypeError, "not NoneType"),
    ],
)
def test_seconds_that_are_refused_are_refused_at_once(
    store: AsyncKVStore, seconds: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        store.claim("k", seconds)


@pytest.mark.parametrize("key", ["", ".", "a\0", 5])
def test_key_that_is_refused_is_refused_at_once(store: AsyncKVStore, key: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^key "):
        store.claim(key)


async def test_timedelta_is_taken(store: AsyncKVStore) -> None:
    async with store.claim("k", timedelta(minutes=2)) as claim:
        assert 100 < claim.seconds_left <= 120


async def test_store_without_claims_says_so_before_the_block(unable: AsyncKVStore) -> None:
    with pytest.raises(UnsupportedError, match=r"the store at backend://DictBackend cannot hold claims; .*memory://"):
        async with unable.claim("k"):
            pytest.fail("the block ran")


async def test_derived_and_pickled_stores_claim_too(url: str, able: AsyncKVStore) -> None:
    events: list[Event] = []
    async with able.with_options(observer=events.append).claim("k"):
        if not url.startswith("memory"):
            copied = pickle.loads(pickle.dumps(able))
            async with copied, copied.claim("k") as claim:
                assert not claim.is_held
    assert len(events) == 4


CONTENDER = """
import asyncio, sys
from aiokv import AsyncKVStore

async def main():
    async with AsyncKVStore("db", url=sys.argv[1]) as store:
        for round_ in range(10):
            async with store.claim("k", 5) as claim:
                if claim.is_held:
                    # Whoever holds it is alone: what it reads stays as it is until it has written.
                    count = int(await store.get("count") or 0)
                    await asyncio.sleep(0.01)
                    await store.set("count", str(count + 1))
                    print("held")
                else:
                    await asyncio.sleep(0.005)

asyncio.run(main())
"""


@pytest.mark.slow
def test_claims_exclude_other_processes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kv.db"
    asyncio.run(AsyncKVStore("db", url=url).set("count", "0"))
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, url], stdout=subprocess.PIPE, env=clean_environment(tmp_path), text=True
        )
        for _ in range(4)
    ]
    held = sum(contender.communicate(timeout=15)[0].count("held") for contender in contenders)
    assert {contender.returncode for contender in contenders} == {0}
    # The others came while somebody held it.
    assert held >= 3
    assert asyncio.run(AsyncKVStore("db", url=url).get("count")) == str(held)
